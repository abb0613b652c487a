// Timers, children by files and by pipes, watched files, a worker thread and the thread pool, all at once.
'use strict';
const { spawn } = require('child_process');
const crypto = require('crypto');
const fs = require('fs');
const { Worker } = require('worker_threads');
const zlib = require('zlib');

const wrong = [];
const progress = { ticks: 0, files: 0, talk: 0, watch: 0, worker: 0, pool: 0 };
const complain = (what) => { if (wrong.length < 10) wrong.push(what); };
let stop = false;

// Timers: each fires once, and none too early.
function tick() {
    const made = performance.now();
    let missing = 3;
    for (const delay of [30, 3, 12]) {
        setTimeout(() => {
            const taken = performance.now() - made;
            if (taken < delay - 1) complain(`a timer of ${delay} ms after ${taken}`);
            if (--missing > 0) return;
            progress.ticks++;
            if (!stop) setImmediate(tick);
        }, delay);
    }
}

// One child after the other, with files as its output and an end of its own.
function make() {
    const number = ++progress.files;
    const name = `output.${number}`;
    const output = fs.openSync(name, 'w');
    const child = spawn('sh', ['-c', `seq ${number} | (while read n; do last=$n; done; echo $last; exit 3)`],
        { stdio: ['ignore', output, output] });
    fs.closeSync(output);
    child.on('exit', (code, signal) => {
        const said = fs.readFileSync(name, 'utf8');
        if (code !== 3 || said !== `${number}\n`) complain(`child ${number}: ${code} ${signal} ${said}`);
        fs.unlinkSync(name);
        if (!stop) make();
    });
}

// A child that lasts, and knows the sum so far. Its pipes are socket pairs.
function talk() {
    const child = spawn('sh', ['-c', 'while read n; do sum=$((sum + n)); echo $sum; done'],
        { stdio: ['pipe', 'pipe', 'inherit'] });
    let sum = 0;
    let answer = '';
    const say = () => {
        sum += ++progress.talk;
        child.stdin.write(`${progress.talk}\n`);
    };
    child.stdout.setEncoding('utf8').on('data', (text) => {
        answer += text;
        if (!answer.endsWith('\n')) return;
        if (answer !== `${sum}\n`) complain(`a child says ${answer} instead of ${sum}`);
        answer = '';
        if (stop) child.stdin.end(); else setTimeout(say, 1);
    });
    child.on('close', (code) => { if (code !== 0) complain(`it ended with ${code}`); });
    say();
}

// Every file that comes to a directory is heard of.
function watch() {
    fs.mkdirSync('watched');
    let expected = null;
    const watcher = fs.watch('watched', (event, name) => {
        if (name !== expected || event !== 'rename') return;
        expected = null;
        fs.unlinkSync(`watched/${name}`);
        if (stop) watcher.close(); else setTimeout(create, 80);
    });
    const create = () => {
        expected = `file.${++progress.watch}`;
        fs.writeFileSync(`watched/${expected}`, '');
    };
    create();
}

// A thread with a heap and an event loop of its own.
function work() {
    const worker = new Worker(`
        const { parentPort } = require('worker_threads');
        const { createHash } = require('crypto');
        parentPort.on('message', ({ digest, times }) => {
            for (let i = 0; i < times; i++) digest = createHash('sha256').update(digest).digest('hex');
            parentPort.postMessage(digest);
        });`, { eval: true });
    let digest = 'seed';
    worker.on('message', (said) => {
        for (let i = 0; i < 50; i++) digest = crypto.createHash('sha256').update(digest).digest('hex');
        if (said !== digest) complain('the worker has another hash');
        progress.worker++;
        if (stop) worker.terminate(); else worker.postMessage({ digest, times: 50 });
    });
    worker.on('error', (error) => complain(`the worker: ${error}`));
    worker.postMessage({ digest, times: 50 });
}

// Compression by the pool's threads.
async function compress() {
    const promise = (f, ...args) => new Promise((done, failed) => f(...args, (e, r) => (e ? failed(e) : done(r))));
    while (!stop) {
        const data = Buffer.alloc(300_000, `data ${++progress.pool} `);
        const packed = await promise(zlib.gzip, data);
        await promise(fs.writeFile, 'packed', packed);
        const again = await promise(zlib.gunzip, await promise(fs.readFile, 'packed'));
        if (!again.equals(data)) complain(`round ${progress.pool} of the pool`);
    }
}

process.on('uncaughtException', (error) => { complain(`${error.stack}`); });
process.on('exit', () => {
    if (!stop) complain('it ended by itself');
    fs.writeFileSync('result', `${wrong.join('\n') || 'ok'}\n`);
    if (wrong.length) process.exitCode = 1;
});
tick();
make();
make();
talk();
watch();
work();
compress().catch((error) => complain(`the pool: ${error}`));

const all = (than) => Object.keys(progress).every((key) => progress[key] >= than[key] + 3);
const zero = Object.fromEntries(Object.keys(progress).map((key) => [key, 0]));
let before = null;
const looking = setInterval(() => {
    if (!before && all(zero) && !fs.existsSync('ready')) fs.writeFileSync('ready', '');
    if (!before && fs.existsSync('go')) before = { ...progress };
    if (!before || !(all(before) || wrong.length)) return;
    clearInterval(looking);
    stop = true;
}, 10);
