#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| cryosleep::fuzz::stream(bytes));
