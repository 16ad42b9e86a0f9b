//! Forwarding: typed wrappers of the redirect and tunnel-key helpers, for which aya has no methods.

use aya_ebpf::{
    bindings::{BPF_F_DONT_FRAGMENT, BPF_F_TUNINFO_IPV6, BPF_F_ZERO_CSUM_TX, bpf_tunnel_key},
    helpers::{bpf_redirect, bpf_redirect_neigh, bpf_skb_get_tunnel_key, bpf_skb_set_tunnel_key},
};
use raven_common::{
    OVERLAY_VNI,
    tables::{CONFIG_OUTER6, CONFIG_TUNNEL_SOURCE, Config},
};

use crate::{maps, parse::Skb};

/// Size of `bpf_tunnel_key` up to its IPv4 part. Kernels before 5.19 return EINVAL for a larger size.
const TUNNEL_KEY_LEN: u32 = core::mem::offset_of!(bpf_tunnel_key, __bindgen_anon_3) as u32;
const _: () = assert!(TUNNEL_KEY_LEN == 28);
// The size with the source address, since Linux 5.19. The flag is the difference, so that no branch is verified twice.
const _: () = assert!(TUNNEL_KEY_LEN + CONFIG_TUNNEL_SOURCE == size_of::<bpf_tunnel_key>() as u32);

/// Redirects the packet to the egress of `ifindex`. The kernel removes the Ethernet header for an L3 device.
#[inline(always)]
pub fn redirect(ifindex: u32) {
    // SAFETY: a helper call without pointers. With flags 0 it always returns TC_ACT_REDIRECT.
    unsafe { bpf_redirect(ifindex, 0) };
}

/// Redirects the packet to `ifindex` with MAC addresses from the neighbour table, by its (outer)
/// destination. Since Linux 5.10.
#[inline(always)]
pub fn redirect_neigh(ifindex: u32) {
    // SAFETY: without parameters (null, length 0) the kernel looks up the destination itself.
    unsafe { bpf_redirect_neigh(ifindex, core::ptr::null_mut(), 0, 0) };
}

/// Sets the tunnel key, from which `raven0` builds the outer header: the packet is sent to `to`, from this node's address.
/// Without [`CONFIG_TUNNEL_SOURCE`], the kernel's routes choose the source.
#[inline(always)]
pub fn set_tunnel_key(skb: &Skb, config: &Config, to: [u8; 4], traffic_class: u8) -> Result<(), ()> {
    // SAFETY: all zero is a valid value of this struct of integers and unions of integers.
    let mut key: bpf_tunnel_key = unsafe { core::mem::zeroed() };
    key.tunnel_id = OVERLAY_VNI;
    key.tunnel_tos = traffic_class;
    key.tunnel_ttl = 64;
    // Kernels that take the shorter key ignore the source.
    let flags = if config.flags & CONFIG_OUTER6 == 0 {
        key.__bindgen_anon_1.remote_ipv4 = u32::from_be_bytes(to);
        key.__bindgen_anon_3.local_ipv4 = u32::from_be_bytes(config.node);
        BPF_F_ZERO_CSUM_TX | BPF_F_DONT_FRAGMENT
    } else {
        key.__bindgen_anon_1.remote_ipv6 = words(maps::outer6(&to).ok_or(())?);
        key.__bindgen_anon_3.local_ipv6 = words(maps::outer6(&config.node).ok_or(())?);
        // With a checksum, which IPv6 requires (RFC 8200 §8.1): Linux drops packets without one.
        BPF_F_TUNINFO_IPV6 | BPF_F_DONT_FRAGMENT
    };
    let len = TUNNEL_KEY_LEN + (config.flags & CONFIG_TUNNEL_SOURCE);
    // SAFETY: `key` outlives the call and has at least `len` bytes, all of them initialised.
    match unsafe { bpf_skb_set_tunnel_key(skb.raw(), &raw mut key, len, flags.into()) } {
        0 => Ok(()),
        _ => Err(()),
    }
}

/// The words of an IPv6 address, each in network order, as `bpf_tunnel_key` has them.
#[inline(always)]
fn words(address: &[u8; 16]) -> [u32; 4] {
    core::array::from_fn(|n| u32::from_ne_bytes(core::array::from_fn(|byte| address[4 * n + byte])))
}

/// The opposite of [`words`].
#[inline(always)]
pub fn bytes(words: [u32; 4]) -> [u8; 16] {
    core::array::from_fn(|n| words[n / 4].to_ne_bytes()[n % 4])
}

/// Outer header fields of a received overlay packet.
#[derive(Clone, Copy)]
pub struct Outer {
    /// Outer address of the sender; `None` if no node of this pool has its IPv6 address.
    pub source: Option<[u8; 4]>,
    /// VXLAN network identifier.
    pub vni: u32,
}

/// Returns the tunnel metadata that `raven0` attached to a received packet, or `None` if there is none or its
/// address family is not the pool's.
#[inline(always)]
pub fn tunnel_key(skb: &Skb, config: &Config) -> Option<Outer> {
    // SAFETY: as in `set_tunnel_key`.
    let mut key: bpf_tunnel_key = unsafe { core::mem::zeroed() };
    let over_ipv6 = config.flags & CONFIG_OUTER6 != 0;
    let flags = if over_ipv6 { BPF_F_TUNINFO_IPV6.into() } else { 0 };
    // SAFETY: `key` outlives the call and has at least TUNNEL_KEY_LEN bytes.
    if unsafe { bpf_skb_get_tunnel_key(skb.raw(), &raw mut key, TUNNEL_KEY_LEN, flags) } != 0 {
        return None;
    }
    let source = if over_ipv6 {
        // SAFETY: with BPF_F_TUNINFO_IPV6 the kernel fills the IPv6 member or returns an error.
        maps::node6(&bytes(unsafe { key.__bindgen_anon_1.remote_ipv6 }))
    } else {
        // SAFETY: without the flag it fills the IPv4 member or returns an error.
        Some(unsafe { key.__bindgen_anon_1.remote_ipv4 }.to_be_bytes())
    };
    Some(Outer { source, vni: key.tunnel_id })
}
