#![no_main]

#[allow(dead_code)]
#[path = "../../tests/oracle/mod.rs"]
mod oracle;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| oracle::validation_agrees(bytes));
