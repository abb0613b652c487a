# tar(1) | gzip(1) | a check of what comes out of it, again and again.
fail() { echo "$1" >> result; exit 1; }

mkdir data
for part in $(seq 1 40); do
    mkdir -p data/$((part % 5))
    seq $part $((part + 20000)) > data/$((part % 5))/$part
done
ln data/1/1 data/hard
ln -s 1/1 data/soft
tar cf plain.tar data || fail "tar"
expected=$(sha256sum < plain.tar)

n=0
while [ ! -e go ]; do
    tar cf - data | gzip -5 | tee packed.new | gzip -d | cmp - plain.tar || fail "round $n: another archive"
    mv packed.new packed.tar.gz
    n=$((n + 1))
    : > ready
done
[ "$(gzip -dc packed.tar.gz | sha256sum)" = "$expected" ] || fail "the last archive is another"
mkdir again
gzip -dc packed.tar.gz | tar xf - -C again || fail "it cannot be unpacked"
diff -r data again/data || fail "what was unpacked differs"
echo ok > result
