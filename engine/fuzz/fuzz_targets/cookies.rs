#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    nts_engine_fuzz::cookies(data);
});
