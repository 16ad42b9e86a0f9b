//! What the eBPF programs and user space share: map layouts, verdicts, packet headers, checksums.
//!
//! One source of truth. Everything that lies in a map is `repr(C)`, has no implicit padding (asserted below each
//! type) and keeps addresses as bytes in network order, so that nobody can forget to swap. This is the one module
//! tree outside `raven-ebpf` that holds `unsafe`: the `Pod` promises in [`tables`].

#![no_std]

pub mod checksum;
pub mod generator;
pub mod header;
pub mod tables;
pub mod verdict;

pub use verdict::Verdict;

/// VXLAN network identifier of the overlay inside a pool (upstream's number).
pub const OVERLAY_VNI: u32 = 200;
/// UDP port of the overlay (upstream's number).
pub const OVERLAY_PORT: u16 = 4472;
/// Bytes that the overlay adds over IPv4: IPv4 20, UDP 8, VXLAN 8, inner Ethernet 14.
pub const OVERLAY_OVERHEAD: usize = 50;
/// Bytes that WireGuard adds over IPv6: IPv6 40, UDP 8, WireGuard 32. (Over IPv4: 60. One number for both, as wg-quick does.)
pub const TUNNEL_OVERHEAD: usize = 80;
/// The Ethernet address of every `raven0`: overlay packets are steered by their outer header and the inner
/// destination prefix, so one address for all nodes saves every neighbour entry. Locally administered; "raven".
pub const OVERLAY_MAC: [u8; 6] = [0x02, b'r', b'a', b'v', b'e', b'n'];
/// The Ethernet source of every overlay packet. Not [`OVERLAY_MAC`]: a VXLAN device takes a packet from its own address
/// for a loop and drops it without a word (`vxlan_set_mac` in drivers/net/vxlan/vxlan_core.c).
pub const OVERLAY_SOURCE_MAC: [u8; 6] = [0x02, b'r', b'a', b'v', b'e', b's'];
