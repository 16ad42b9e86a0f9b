//! Changes to a packet: decrement of TTL or hop limit, MSS clamping, the overlay's outer header.

use aya_ebpf::{
    bindings::{
        BPF_ADJ_ROOM_ENCAP_L2_MASK, BPF_ADJ_ROOM_ENCAP_L2_SHIFT, BPF_F_ADJ_ROOM_ENCAP_L3_IPV4,
        BPF_F_ADJ_ROOM_ENCAP_L4_UDP, BPF_F_ADJ_ROOM_FIXED_GSO, BPF_F_RECOMPUTE_CSUM,
        bpf_adj_room_mode::BPF_ADJ_ROOM_MAC,
    },
    helpers::bpf_skb_change_head,
};
use raven_common::{
    OVERLAY_OVERHEAD, OVERLAY_SOURCE_MAC,
    header::{ETH_LEN, ETH_P_IP, Ethernet, Ip, OverlayHeader},
};

use crate::parse::Skb;

/// Decrements TTL or hop limit, because a redirect is a router's hop. The caller has checked that it is above 1.
#[inline(always)]
pub fn take_hop<I: Ip>(skb: &Skb, l3: usize, header: &I) -> Result<(), ()> {
    let hop = header.hop();
    let offset = l3 + hop.offset;
    // Two calls instead of a variable length: the verifier requires a constant size.
    let stored = if I::LEN == 20 {
        skb.ctx.store(offset, &hop.bytes, BPF_F_RECOMPUTE_CSUM as u64)
    } else {
        skb.ctx.store(offset, &hop.bytes[0], BPF_F_RECOMPUTE_CSUM as u64)
    };
    stored.map_err(|_| ())
}

/// The SYN flag of TCP (RFC 9293).
const TCP_SYN: u8 = 0x02;
/// Kinds of TCP options (RFC 9293): end of list, no operation, maximum segment size.
const TCP_OPT_END: u8 = 0;
const TCP_OPT_NOP: u8 = 1;
const TCP_OPT_MSS: u8 = 2;
/// Length of the MSS option: kind, length and two bytes of value.
const TCP_OPT_MSS_LEN: u8 = 4;
/// Limit of options to parse: 40 bytes hold at most 20 options of two bytes, and senders put the MSS first.
const MAX_OPTIONS: usize = 20;

/// Lowers the MSS option of a SYN or SYN-ACK to fit `mtu`. Leaves other packets unchanged, and also SYNs whose options
/// cannot be parsed: path MTU discovery by ICMP still works for them.
#[inline(always)]
pub fn clamp_mss<I: Ip>(skb: &Skb, l3: usize, header: &I, mtu: u32) {
    let Some(tcp) = header.tcp_offset() else { return };
    let tcp = l3 + tcp;
    let Ok(flags) = skb.ctx.load::<u8>(tcp + 13) else { return };
    if flags & TCP_SYN != 0 {
        clamp_mss_of_syn(skb, tcp, (mtu as u16).wrapping_sub(I::LEN as u16 + 20));
    }
}

/// Clamps the MSS of a SYN. Not inlined, because it runs once per connection and direction.
#[inline(never)]
fn clamp_mss_of_syn(skb: &Skb, tcp: usize, limit: u16) -> Option<()> {
    let doff: u8 = skb.ctx.load(tcp + 12).ok()?;
    let end = tcp + (doff >> 4) as usize * 4;
    let mut at = tcp + 20;
    for _ in 0..MAX_OPTIONS {
        if at + 2 > end {
            return None;
        }
        let [kind, len]: [u8; 2] = skb.ctx.load(at).ok()?;
        match kind {
            TCP_OPT_END => return None,
            TCP_OPT_NOP => at += 1,
            // The value must lie within the options; the bytes behind them are payload of the SYN (TCP Fast Open).
            TCP_OPT_MSS if len == TCP_OPT_MSS_LEN && at + 4 <= end => return lower_mss(skb, tcp, at + 2, limit),
            // An MSS option of another length, or a length below 2, which would not advance: malformed,
            // left to the receiver.
            _ if kind == TCP_OPT_MSS || len < 2 => return None,
            _ => at += len as usize,
        }
    }
    None
}

#[inline(always)]
fn lower_mss(skb: &Skb, tcp: usize, at: usize, limit: u16) -> Option<()> {
    let old: [u8; 2] = skb.ctx.load(at).ok()?;
    if u16::from_be_bytes(old) <= limit {
        return None;
    }
    let new = limit.to_be_bytes();
    // At an odd offset (after one NOP), the value spans two 16-bit words of the checksum, with swapped bytes. Shifts
    // instead of a branch, because the verifier would follow every sequence of options to know its outcome.
    let shift = ((at - tcp) & 1) * 8;
    let word = |b: [u8; 2]| {
        let word = u16::from_ne_bytes(b) as usize;
        (word << shift | word >> shift) as u16
    };
    skb.ctx.l4_csum_replace(tcp + 16, word(old) as u64, word(new) as u64, 2).ok()?;
    skb.ctx.store(at, &new, 0).ok()
}

/// Sets the source MAC address of an overlay packet. The stack has set it to [`raven_common::OVERLAY_MAC`], which
/// receivers would drop as a loop.
#[inline(always)]
pub fn set_overlay_source(skb: &Skb) -> Result<(), ()> {
    skb.ctx.store(6, &OVERLAY_SOURCE_MAC, 0).map_err(|_| ())
}

/// Prepends an Ethernet header to a packet from an L3 device. It is filled later or from the neighbour table.
#[inline(always)]
pub fn push_ethernet(skb: &Skb) -> Result<(), ()> {
    // SAFETY: a helper call on the program's own context; no pointer into the packet is used after it.
    if unsafe { bpf_skb_change_head(skb.raw(), ETH_LEN as u32, 0) } == 0 { Ok(()) } else { Err(()) }
}

/// Writes the Ethernet header of a packet for `raven0`.
#[inline(always)]
pub fn set_ethernet(skb: &Skb, ethertype: u16) -> Result<(), ()> {
    skb.ctx.store(0, &Ethernet::overlay(ethertype), 0).map_err(|_| ())
}

/// Outer Ethernet header, whose addresses come from the neighbour table, and overlay header: stored with one write.
#[repr(C)]
#[derive(Clone, Copy)]
struct Outer {
    ethernet: Ethernet,
    overlay: OverlayHeader,
}

/// Wraps the packet, which already has an empty Ethernet header, in the overlay's outer header. Aggregates stay
/// aggregates: the flags give the offset of the inner packet, with which the kernel can segment it later.
#[inline(always)]
pub fn wrap(skb: &Skb, header: &OverlayHeader) -> Result<(), ()> {
    let flags = (BPF_F_ADJ_ROOM_FIXED_GSO | BPF_F_ADJ_ROOM_ENCAP_L3_IPV4 | BPF_F_ADJ_ROOM_ENCAP_L4_UDP) as u64
        | (ETH_LEN as u64 & BPF_ADJ_ROOM_ENCAP_L2_MASK as u64) << BPF_ADJ_ROOM_ENCAP_L2_SHIFT;
    skb.ctx.adjust_room(OVERLAY_OVERHEAD as i32, BPF_ADJ_ROOM_MAC, flags).map_err(|_| ())?;
    skb.ctx.store(0, &Outer { ethernet: Ethernet::overlay(ETH_P_IP), overlay: *header }, 0).map_err(|_| ())
}
