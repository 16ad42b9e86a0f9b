//! Sending a packet on: typed wrappers of the helpers that aya has no method for.

use aya_ebpf::{
    bindings::{BPF_F_DONT_FRAGMENT, BPF_F_ZERO_CSUM_TX, bpf_tunnel_key},
    helpers::{bpf_redirect, bpf_redirect_neigh, bpf_skb_get_tunnel_key, bpf_skb_set_tunnel_key},
};
use raven_common::OVERLAY_VNI;

use crate::parse::Skb;

/// Size of `bpf_tunnel_key` up to its IPv4 part: all that kernels before 5.19 know (a larger one is EINVAL there).
const TUNNEL_KEY_LEN: u32 = core::mem::offset_of!(bpf_tunnel_key, __bindgen_anon_3) as u32;
const _: () = assert!(TUNNEL_KEY_LEN == 28);

/// Hands the packet to the egress of `ifindex`; an L3 device gets it without its Ethernet header.
#[inline(always)]
pub fn redirect(ifindex: u32) {
    // SAFETY: a helper call without pointers. With flags 0 it cannot fail here: the answer is TC_ACT_REDIRECT.
    unsafe { bpf_redirect(ifindex, 0) };
}

/// Hands the packet to `ifindex`, Ethernet addresses from the neighbour table by its (outer) destination. Since 5.10.
#[inline(always)]
pub fn redirect_neigh(ifindex: u32) {
    // SAFETY: no parameters are passed (null, length 0), so the kernel looks the destination up itself.
    unsafe { bpf_redirect_neigh(ifindex, core::ptr::null_mut(), 0, 0) };
}

/// Tells `raven0` where the packet goes when it is sent there.
#[inline(always)]
pub fn set_tunnel_key(skb: &Skb, to: [u8; 4], traffic_class: u8) -> Result<(), ()> {
    // SAFETY: all zero is a value of this struct of integers and unions of integers.
    let mut key: bpf_tunnel_key = unsafe { core::mem::zeroed() };
    key.tunnel_id = OVERLAY_VNI;
    key.__bindgen_anon_1.remote_ipv4 = u32::from_be_bytes(to);
    key.tunnel_tos = traffic_class;
    key.tunnel_ttl = 64;
    let flags = (BPF_F_ZERO_CSUM_TX | BPF_F_DONT_FRAGMENT) as u64;
    // SAFETY: `key` outlives the call and is at least TUNNEL_KEY_LEN bytes, all of them initialised.
    match unsafe { bpf_skb_set_tunnel_key(skb.raw(), &mut key, TUNNEL_KEY_LEN, flags) } {
        0 => Ok(()),
        _ => Err(()),
    }
}

/// Who sent this overlay packet.
#[derive(Clone, Copy)]
pub struct Outer {
    /// Outer source address.
    pub source: [u8; 4],
    /// VXLAN network identifier.
    pub vni: u32,
}

/// The tunnel metadata that `raven0` left on a received packet.
#[inline(always)]
pub fn tunnel_key(skb: &Skb) -> Option<Outer> {
    // SAFETY: as in `set_tunnel_key`.
    let mut key: bpf_tunnel_key = unsafe { core::mem::zeroed() };
    // SAFETY: `key` outlives the call and has room for TUNNEL_KEY_LEN bytes.
    if unsafe { bpf_skb_get_tunnel_key(skb.raw(), &mut key, TUNNEL_KEY_LEN, 0) } != 0 {
        return None;
    }
    // SAFETY: without BPF_F_TUNINFO_IPV6 the kernel fills the IPv4 member, or refuses.
    let source = unsafe { key.__bindgen_anon_1.remote_ipv4 };
    Some(Outer { source: source.to_be_bytes(), vni: key.tunnel_id })
}
