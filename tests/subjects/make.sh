# make(1) with four jobs, gcc(1) below it: a program of some files is built again and again.
export TMPDIR=$PWD
command -v make > /dev/null || { echo "skip: no make" > result; : > ready; exit; }
fail() { echo "$1" >> result; exit 1; }

cat > Makefile <<'MAKE'
CFLAGS = -O1 -Wall -Wextra -Werror
objects := $(patsubst %.c,%.o,$(wildcard *.c))
program: $(objects)
	gcc -o $@ $(objects)
%.o: %.c all.h
	gcc $(CFLAGS) -MMD -c -o $@ $<
clean:
	rm -f program *.o *.d
.PHONY: clean
MAKE
parts=$(seq 1 24)
for part in $parts; do
    echo "long part_$part(long);" >> all.h
    echo "#include \"all.h\"
long part_$part(long sum) { for (long i = 0; i < $part; i++) sum = sum * 31 + i % 7; return sum; }" > part_$part.c
done
{
    echo '#include <stdio.h>'
    echo '#include "all.h"'
    echo 'int main(void) { long sum = 1;'
    for part in $parts; do echo "sum = part_$part(sum);"; done
    echo 'printf("%lx", sum); }'
} > main.c

builds=0
while [ ! -e go ]; do
    make -s -j4 clean && make -s -j4 || fail "build $builds failed"
    said=$(./program)
    expected=${expected:-$said}
    [ -n "$said" ] && [ "$said" = "$expected" ] || fail "build $builds says $said instead of $expected"
    builds=$((builds + 1))
    : > ready
done
# What was built last is whole: nothing is to be done.
make -q || fail "the last build is not complete"
left=$(ls cc* 2> /dev/null) && fail "left behind: $left"
echo ok > result
