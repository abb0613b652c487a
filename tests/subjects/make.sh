# make(1) with four jobs, gcc(1) below it: a program of 25 files is built again and again.
export TMPDIR=$PWD
command -v make > /dev/null || { echo "skip: no make" > result; : > ready; exit; }
fail() { echo "$1" >> result; exit 1; }

# One make(1) for each directory, which share the jobs; every other compiler passes its output on by a pipe.
cat > Makefile <<'MAKE'
program: one two main.c
	gcc -o $@ main.c one/*.o two/*.o
one two:
	+$(MAKE) -s -C $@
clean:
	rm -f program */*.o */*.d
.PHONY: one two clean
MAKE
for part in $(seq 1 24); do echo "long part_$part(long);" >> all.h; done
for directory in one two; do
    mkdir $directory
    cat > $directory/Makefile <<'MAKE'
all: $(patsubst %.c,%.o,$(wildcard *.c))
%.o: %.c ../all.h
	gcc -O1 -Wall -Wextra -Werror $(if $(findstring 2,$*),-pipe) -MMD -c -o $@ $<
MAKE
done
{
    echo '#include <stdio.h>'
    echo '#include "all.h"'
    echo 'int main(void) { long sum = 1;'
    for part in $(seq 1 24); do
        directory=one
        [ $part -gt 12 ] && directory=two
        echo '#include "../all.h"' > $directory/part_$part.c
        body="for (long i = 0; i < $part; i++) sum = sum * 31 + i % 7; return sum;"
        echo "long part_$part(long sum) { $body }" >> $directory/part_$part.c
        echo "sum = part_$part(sum);"
    done
    echo 'printf("%lx", sum); }'
} > main.c

builds=0
while [ ! -e go ]; do
    make -s clean && make -s -j4 2> errors || fail "build $builds failed"
    # Lost jobs are complained of at the end.
    [ -s errors ] && fail "build $builds says $(cat errors)"
    said=$(./program)
    expected=${expected:-$said}
    [ -n "$said" ] && [ "$said" = "$expected" ] || fail "build $builds says $said instead of $expected"
    builds=$((builds + 1))
    : > ready
done
# What was built last is whole: nothing is to be done.
make -q -C one && make -q -C two || fail "the last build is not complete"
left=$(ls cc* */cc* 2> /dev/null) && fail "left behind: $left"
echo ok > result
