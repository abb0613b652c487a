import java.io.*;
import java.util.*;
import java.util.concurrent.*;
import java.util.concurrent.atomic.*;

/** Four workers, a heap that grows, compiled code, garbage, and sums that are known beforehand. */
public class Work {
    static final int WORKERS = 4;
    static final List<int[]> heap = Collections.synchronizedList(new ArrayList<>());
    static final AtomicLong rounds = new AtomicLong();
    static volatile boolean stop;

    /** The number of primes below. */
    static int primes(int below) {
        boolean[] composite = new boolean[below];
        int count = 0;
        for (int i = 2; i < below; i++) {
            if (composite[i]) continue;
            count++;
            for (long j = (long) i * i; j < below; j += i) composite[(int) j] = true;
        }
        return count;
    }

    static String work(int me) throws Exception {
        Random random = new Random(me);
        Map<Integer, String> map = new TreeMap<>();
        while (!stop) {
            if (primes(100_000) != 9592) return "worker " + me + ": the number of primes is wrong";
            int key = random.nextInt(1000);
            String value = map.put(key, "value " + key);
            if (value != null && !value.equals("value " + key)) return "worker " + me + ": the map is wrong";
            if (heap.size() < 400) {
                int[] block = new int[50_000];
                int seed = heap.size() + 7;
                for (int i = 0; i < block.length; i++) block[i] = i == 0 ? seed : block[i - 1] * 1664525 + 1013904223;
                heap.add(block);
            }
            rounds.incrementAndGet();
        }
        return null;
    }

    public static void main(String[] arguments) throws Exception {
        ExecutorService pool = Executors.newFixedThreadPool(WORKERS);
        List<Future<String>> workers = new ArrayList<>();
        for (int i = 0; i < WORKERS; i++) {
            int me = i;
            workers.add(pool.submit(() -> work(me)));
        }
        while (rounds.get() < 20) Thread.sleep(5);
        new File("ready").createNewFile();
        while (!new File("go").exists()) Thread.sleep(5);
        long before = rounds.get();
        while (rounds.get() < before + 20) Thread.sleep(5);
        stop = true;
        List<String> wrong = new ArrayList<>();
        for (Future<String> worker : workers) {
            String said = worker.get();
            if (said != null) wrong.add(said);
        }
        pool.shutdown();
        for (int[] block : heap)
            for (int i = 1; i < block.length; i++)
                if (block[i] != block[i - 1] * 1664525 + 1013904223) {
                    wrong.add("the heap has changed");
                    break;
                }
        if (heap.isEmpty()) wrong.add("the heap is empty");
        try (FileWriter result = new FileWriter("result")) {
            result.write((wrong.isEmpty() ? "ok" : String.join("\n", wrong)) + "\n");
        }
    }
}
