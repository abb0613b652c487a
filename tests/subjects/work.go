// Goroutines that compute, that pass messages on, that wait for timers, for pipes (by the netpoller), for children.
package main

import (
	"bufio"
	"bytes"
	"context"
	"crypto/sha256"
	"fmt"
	"io"
	"os"
	"os/exec"
	"runtime"
	"sync"
	"sync/atomic"
	"time"
)

var (
	stop     atomic.Bool
	progress [6]atomic.Int64
	mutex    sync.Mutex
	wrong    []string
)

func complain(format string, args ...any) {
	mutex.Lock()
	defer mutex.Unlock()
	if len(wrong) < 10 {
		wrong = append(wrong, fmt.Sprintf(format, args...))
	}
}

// A chain of hashes, with garbage: one wrong bit anywhere and the end is another.
func compute(count *atomic.Int64) {
	chain := func(rounds int64) (digest [32]byte) {
		var kept [][]byte
		for i := int64(0); i < rounds; i++ {
			kept = append(kept, bytes.Repeat(digest[:], 100))
			digest = sha256.Sum256(kept[len(kept)-1])
			if len(kept) > 500 {
				kept = nil
			}
		}
		return
	}
	known := chain(2000)
	for !stop.Load() {
		if chain(2000) != known {
			complain("another hash")
		}
		count.Add(1)
	}
}

// A ring of goroutines: a number goes round, each adds one.
func ring(count *atomic.Int64) {
	const size = 1000
	first := make(chan int)
	last := first
	for i := 0; i < size; i++ {
		from, to := last, make(chan int)
		go func() {
			for number := range from {
				to <- number + 1
			}
			close(to)
		}()
		last = to
	}
	for !stop.Load() {
		first <- 0
		if number := <-last; number != size {
			complain("%d came round the ring", number)
		}
		count.Add(1)
	}
	close(first)
}

// Timers, tickers and deadlines: none fires too early, and each does.
func wait(count *atomic.Int64) {
	for !stop.Load() {
		begun := time.Now()
		deadline, cancel := context.WithTimeout(context.Background(), 8*time.Millisecond)
		select {
		case <-deadline.Done():
		case <-time.After(20 * time.Second):
			complain("a deadline was missed")
		}
		cancel()
		if taken := time.Since(begun); taken < 8*time.Millisecond {
			complain("8 ms took %v", taken)
		}
		ticker := time.NewTicker(time.Millisecond)
		for i := 0; i < 3; i++ {
			<-ticker.C
		}
		ticker.Stop()
		count.Add(1)
	}
}

// A pipe of our own, non-blocking: the netpoller waits for both ends. It is full most of the time.
func pipe(count *atomic.Int64) {
	reader, writer, err := os.Pipe()
	if err != nil {
		complain("pipe: %v", err)
		return
	}
	go func() {
		block := make([]byte, 100_000)
		for next := byte(0); !stop.Load(); {
			for i := range block {
				block[i] = next
				next++
			}
			if _, err := writer.Write(block); err != nil {
				complain("write: %v", err)
			}
		}
		writer.Close()
	}()
	block := make([]byte, 30_000)
	for expected := byte(0); ; {
		length, err := reader.Read(block)
		if err == io.EOF {
			return
		}
		for _, got := range block[:length] {
			if err != nil || got != expected {
				complain("read %d instead of %d: %v", got, expected, err)
				return
			}
			expected++
		}
		count.Add(1)
	}
}

// A child that lasts, and knows the sum so far.
func talk(count *atomic.Int64) {
	child := exec.Command("sh", "-c", "while read n; do sum=$((sum + n)); echo $sum; done")
	in, _ := child.StdinPipe()
	out, _ := child.StdoutPipe()
	if err := child.Start(); err != nil {
		complain("start: %v", err)
		return
	}
	answers := bufio.NewReader(out)
	for sum := int64(0); !stop.Load(); {
		number := count.Add(1)
		sum += number
		fmt.Fprintln(in, number)
		if said, err := answers.ReadString('\n'); said != fmt.Sprintln(sum) {
			complain("a child says %q instead of %d: %v", said, sum, err)
			break
		}
	}
	in.Close()
	if err := child.Wait(); err != nil {
		complain("a child: %v", err)
	}
}

// One short-lived child after the other.
func spawn(count *atomic.Int64) {
	for !stop.Load() {
		number := count.Add(1)
		child := exec.Command("sh", "-c", fmt.Sprintf("seq %d | while read n; do :; done; echo %d; exit 3", number, number))
		said, err := child.Output()
		if child.ProcessState == nil || child.ProcessState.ExitCode() != 3 || string(said) != fmt.Sprintln(number) {
			complain("child %d: %v %q", number, err, said)
		}
	}
}

func all(than [6]int64) bool {
	for i := range progress {
		if progress[i].Load() < than[i]+3 {
			return false
		}
	}
	return true
}

func main() {
	// More threads than this machine has processors.
	runtime.GOMAXPROCS(4)
	var jobs sync.WaitGroup
	for i, job := range []func(*atomic.Int64){compute, ring, wait, pipe, talk, spawn} {
		i, job := i, job
		jobs.Add(1)
		go func() {
			defer jobs.Done()
			job(&progress[i])
		}()
	}
	until := func(done func() bool) {
		for !done() && len(wrong) == 0 {
			time.Sleep(5 * time.Millisecond)
		}
	}
	until(func() bool { return all([6]int64{}) })
	os.WriteFile("ready", nil, 0o644)
	until(func() bool { _, err := os.Stat("go"); return err == nil })
	var before [6]int64
	for i := range progress {
		before[i] = progress[i].Load()
	}
	until(func() bool { return all(before) })
	stop.Store(true)
	jobs.Wait()
	result := "ok\n"
	for i, what := range wrong {
		if i == 0 {
			result = ""
		}
		result += what + "\n"
	}
	os.WriteFile("result", []byte(result), 0o644)
}
