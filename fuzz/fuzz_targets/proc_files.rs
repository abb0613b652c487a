#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| cryosleep::fuzz::proc_file(bytes));
