//! What the benchmarks' packet generator is told (`raven-ebpf/src/bin/raven-bench.rs`, `tests/bench/`).

/// Length of a generated frame, bytes.
pub const FRAME_LEN: usize = 128;

/// `GENERATOR`: a frame, and the one IPv4 address in it that takes turns.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Generator {
    /// Device that frames leave by.
    pub ifindex: u32,
    /// How many addresses take turns; at least 1.
    pub addresses: u32,
    /// From one to the next.
    pub stride: u32,
    /// Where the address stands in the frame; below 124.
    pub address_at: u32,
    /// Where the checksum of the IPv4 header with the address stands.
    pub checksum_at: u32,
    /// That checksum as it is with the first address, host order.
    pub checksum: u32,
    /// The first address, network order.
    pub base: [u8; 4],
    /// The frame.
    pub frame: [u8; FRAME_LEN],
}

/// `SENDER`: frames that one CPU has sent.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Sender {
    /// All.
    pub sent: u64,
    /// Of these, arrived or given up, as of the last look.
    pub done: u64,
    /// Given up.
    pub lost: u64,
}

const _: () = assert!(size_of::<Generator>() == 28 + FRAME_LEN);
