# A database in WAL mode: one process writes and one reads, each an sqlite3(1) that a shell talks to by pipes; others come
# and go. Whoever goes and finds that nobody else has the locks of a connection removes the log, with what is in it.
#
# Every transaction leaves the sum of all rows at zero, so whoever reads must see zero, whatever the moment; and more
# rows than before. Small checkpoints of the log happen all the time.
transaction='
BEGIN;
INSERT INTO rows WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 200)
    SELECT NULL, i, hex(randomblob(50)) FROM n;
INSERT INTO rows SELECT NULL, -value, payload FROM rows ORDER BY id DESC LIMIT 200;
DELETE FROM rows WHERE id IN (SELECT id FROM rows ORDER BY id LIMIT 400) AND (SELECT count(*) FROM rows) > 8000;
UPDATE written SET transactions = transactions + 1;
COMMIT;
SELECT changes();'
question='
BEGIN;
SELECT total(value) FROM rows;
SELECT (SELECT total(value) FROM rows) || " " || transactions FROM written;
COMMIT;'
sql() { sqlite3 -batch -bail -cmd ".timeout 20000" data.db; }

command -v sqlite3 > /dev/null || { echo "skip: no sqlite3" > result; : > ready; exit; }
fail() { echo "$1" >> result; exit 1; }

sql > mode <<'SQL' || fail "it cannot be made"
PRAGMA journal_mode = WAL;
CREATE TABLE rows(id INTEGER PRIMARY KEY AUTOINCREMENT, value INTEGER, payload TEXT);
CREATE TABLE written(transactions INTEGER);
INSERT INTO written VALUES(0);
SQL
[ "$(cat mode)" = wal ] || fail "it is in the mode $(cat mode)"

# Asks for one transaction after the other, and each time waits for the answer.
write() {
    mkfifo answers
    (
        exec 3< answers
        echo "PRAGMA wal_autocheckpoint = 20;" 
        read limit <&3
        n=0
        while [ ! -e stop ]; do
            echo "$transaction"
            read changed <&3 || exit 1
            n=$((n + 1))
            echo $n > transactions.new && mv transactions.new transactions
        done
    ) | sql > answers
}

# The answers of one snapshot, after those before.
compare() {
    [ "$2 $3" = "0.0 0.0" ] || fail "the $1 sees sums of $2 and $3"
    [ "$4" -ge "$5" ] || fail "the $1 sees $4 transactions after $5"
}

# One snapshot after the other.
read_all() {
    mkfifo answers.reader
    (
        exec 3< answers.reader
        n=0
        while [ ! -e stop ]; do
            before=$n
            echo "$question"
            read sum <&3 && read again n <&3 || exit 1
            compare reader "$sum" "$again" "$n" $before
            : > reads.reader
        done
    ) | sql > answers.reader
}

# A new connection for each.
visit() {
    n=0
    while [ ! -e stop ]; do
        before=$n
        said=$(echo "$question" | sql) || fail "a visitor failed: $said"
        set -- $said
        n=$3
        compare visitor "$1" "$2" "$n" $before
        : > reads.visitor
    done
}

write & writer=$!
read_all & reader=$!
visit & visitor=$!
while [ ! -e transactions ] || [ ! -e reads.reader ] || [ ! -e reads.visitor ]; do sleep 0.01; done
: > ready
while [ ! -e go ]; do sleep 0.02; done
before=$(cat transactions)
while [ $(cat transactions) -lt $((before + 3)) ] && [ ! -e result ]; do sleep 0.02; done
: > stop
wait $writer || fail "the writer failed"
wait $reader || fail "the reader failed"
wait $visitor || fail "a visitor failed"
[ ! -e result ] || exit 1
said=$(echo "PRAGMA integrity_check; SELECT sum(value), (SELECT transactions FROM written) FROM rows;" | sql)
[ "$said" = "ok
0|$(cat transactions)" ] || fail "after $(cat transactions) transactions it says: $said"
echo ok > result
