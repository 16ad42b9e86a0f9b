//! Map layouts of the benchmarks' packet generator (`raven-ebpf/src/bin/raven-bench.rs`, `tests/bench/`).

/// Length of a generated frame in bytes.
pub const FRAME_LEN: usize = 128;

/// Value of `GENERATOR`: a frame template with one IPv4 address that varies from frame to frame.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Generator {
    /// Interface index of the device that sends the frames.
    pub ifindex: u32,
    /// Number of addresses to cycle through; at least 1.
    pub addresses: u32,
    /// Difference between two consecutive addresses.
    pub stride: u32,
    /// Offset of the varying address in the frame in bytes; below 124.
    pub address_at: u32,
    /// Offset of the checksum of the IPv4 header that contains the address.
    pub checksum_at: u32,
    /// Checksum of that header with the first address, in host order.
    pub checksum: u32,
    /// First address, in network order.
    pub base: [u8; 4],
    /// Frame template, starting at the Ethernet header.
    pub frame: [u8; FRAME_LEN],
}

/// Value of `SENDER`: frames that one CPU has sent.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Sender {
    /// Number of frames sent.
    pub sent: u64,
    /// Number of sent frames that had arrived or were counted as lost at the last check.
    pub done: u64,
    /// Number of frames counted as lost.
    pub lost: u64,
}

const _: () = assert!(size_of::<Generator>() == 28 + FRAME_LEN);
