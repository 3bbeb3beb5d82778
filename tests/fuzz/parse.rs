#![no_main]

mod targets;

libfuzzer_sys::fuzz_target!(|text: &str| targets::parse(text));
