//! Types shared by the eBPF programs and user space: map layouts, verdicts, packet headers and checksums.
//!
//! Every type stored in a map is `repr(C)`, has no implicit padding (asserted next to each type) and keeps addresses as
//! bytes in network order, so that no code path has to swap them. Outside `raven-ebpf`, this is the only module tree
//! with `unsafe` code: the `aya::Pod` implementations in [`tables`].

#![no_std]

pub mod checksum;
pub mod generator;
pub mod header;
pub mod mac1;
pub mod tables;
pub mod verdict;

pub use verdict::Verdict;

/// VXLAN network identifier of the overlay inside a pool (the same number as upstream).
pub const OVERLAY_VNI: u32 = 200;
/// UDP port of the overlay (the same number as upstream).
pub const OVERLAY_PORT: u16 = 4472;
/// Encapsulation overhead of the overlay over IPv4 in bytes: IPv4 20, UDP 8, VXLAN 8, inner Ethernet 14.
pub const OVERLAY_OVERHEAD: usize = 50;
/// The same over IPv6, whose header has 40 bytes.
pub const OVERLAY_OVERHEAD6: usize = 70;
/// Encapsulation overhead of WireGuard over IPv6 in bytes: IPv6 40, UDP 8, WireGuard 32. IPv4 needs only 60; as in
/// wg-quick, the larger number applies to both.
pub const TUNNEL_OVERHEAD: usize = 80;
/// MAC address of `raven0` on every node: the letters "raven" in a locally administered address. Overlay packets are
/// routed by outer header and inner prefix, so one address for all nodes makes neighbour entries unnecessary.
pub const OVERLAY_MAC: [u8; 6] = [0x02, b'r', b'a', b'v', b'e', b'n'];
/// Source MAC address of every overlay packet. It differs from [`OVERLAY_MAC`] because a VXLAN device silently drops a
/// packet from its own address as a loop (`vxlan_set_mac` in drivers/net/vxlan/vxlan_core.c).
pub const OVERLAY_SOURCE_MAC: [u8; 6] = [0x02, b'r', b'a', b'v', b'e', b's'];
