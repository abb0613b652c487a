# A database in WAL mode: one process writes, two read, each an sqlite3(1) that a shell talks to by pipes.
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

# A snapshot within one transaction, then the next.
read_all() {
    mkfifo answers.$1
    (
        exec 3< answers.$1
        before=0
        while [ ! -e stop ]; do
            echo "$question"
            read sum <&3 && read again n <&3 || exit 1
            [ "$sum $again" = "0.0 0.0" ] || fail "reader $1: sums of $sum and $again"
            [ "$n" -ge $before ] || fail "reader $1: $n transactions after $before"
            before=$n
            [ -e reads.$1 ] || : > reads.$1
        done
    ) | sql > answers.$1
}

write & writer=$!
read_all 1 & first=$!
read_all 2 & second=$!
while [ ! -e transactions ] || [ ! -e reads.1 ] || [ ! -e reads.2 ]; do sleep 0.01; done
: > ready
while [ ! -e go ]; do sleep 0.02; done
before=$(cat transactions)
while [ $(cat transactions) -lt $((before + 3)) ] && [ ! -e result ]; do sleep 0.02; done
: > stop
wait $writer || fail "the writer failed"
wait $first || fail "the first reader failed"
wait $second || fail "the second reader failed"
[ ! -e result ] || exit 1
said=$(echo "PRAGMA integrity_check; SELECT sum(value), (SELECT transactions FROM written) FROM rows;" | sql)
[ "$said" = "ok
0|$(cat transactions)" ] || fail "after $(cat transactions) transactions it says: $said"
echo ok > result
