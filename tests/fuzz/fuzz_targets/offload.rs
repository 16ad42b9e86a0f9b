//! Packets of peers and aggregates of the kernel in the userspace engine: nothing panics, and what is joined is divided
//! into as many packets of the same length. (Their bytes are compared by the properties in `raven-engine`.)
#![no_main]

use libfuzzer_sys::fuzz_target;
use raven_engine::offload::{Coalescer, Header, LENGTH, split};

fuzz_target!(|bytes: &[u8]| {
    if let Some((header, packet)) = bytes.split_first_chunk::<LENGTH>()
        && let Some(header) = Header::parse(*header)
    {
        let _ = split(header, &mut packet.to_vec(), 1420, |segment| assert!(!segment.is_empty() || packet.is_empty()));
    }
    let mut before = Vec::new();
    let mut coalescer = Coalescer::new(true);
    let mut rest = bytes;
    while let Some((&length, more)) = rest.split_first() {
        let (packet, more) = more.split_at(usize::from(length).min(more.len()));
        rest = more;
        if !packet.is_empty() {
            before.push(packet.len());
            coalescer.push(packet.into());
        }
    }
    let mut after = Vec::new();
    coalescer.drain(|parts| {
        let written: Vec<u8> = parts.iter().flat_map(|part| part.iter().copied()).collect();
        let (header, packet) = written.split_first_chunk::<LENGTH>().expect("a virtio header");
        let header = Header::parse(*header).expect("a valid header");
        split(header, &mut packet.to_vec(), 0, |segment| after.push(segment.len())).expect("a well-formed aggregate");
    });
    before.sort_unstable();
    after.sort_unstable();
    assert_eq!(before, after);
});
