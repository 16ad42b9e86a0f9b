//! Records of the eBPF programs' ring buffer.
#![no_main]

use libfuzzer_sys::fuzz_target;
use raven_common::{Verdict, tables::DropSample};

fuzz_target!(|bytes: &[u8]| {
    if let Some(sample) = DropSample::parse(bytes) {
        let _ = Verdict::from_number(sample.verdict).map(Verdict::as_str);
    }
});
