# Three levels of shells with pipes between them, which hold data while the checkpoint is made.
#
# The writer is done, and ends only when the reader has all; the filter in between has some in each of its
# pipes. Each makes and reaps `sleep` processes all the time.
sh -c '
    (
        i=0
        while [ $i -lt 1000 ]; do echo $i; i=$((i + 1)); done
        : > written
        while [ ! -e go ]; do sleep 0.02; done
        echo last
    ) | sh -c "
        n=0
        while read line; do
            echo \$line
            n=\$((n + 1))
            if [ \$n = 300 ]; then : > half; while [ ! -e go ]; do sleep 0.03; done; fi
        done
    " | (
        while [ ! -e half ] || [ ! -e written ]; do sleep 0.01; done
        : > ready
        while [ ! -e go ]; do sleep 0.01; done
        expected=0
        while read line; do
            if [ "$line" = last ]; then
                [ $expected = 1000 ] && exit 0
                echo "last after $expected" >> result
                exit 1
            fi
            if [ "$line" != $expected ]; then echo "$line instead of $expected" >> result; exit 1; fi
            expected=$((expected + 1))
        done
        echo "the end after $expected" >> result
        exit 1
    )
'
status=$?
[ "$SUBJECT" = "its environment" ] || echo "SUBJECT=$SUBJECT" >> result
[ $status = 0 ] && [ ! -e result ] && echo ok > result
exit $status
