//! Changes to a packet: one hop less, a smaller MSS, the overlay's outer header.

use aya_ebpf::{
    bindings::{
        BPF_ADJ_ROOM_ENCAP_L2_MASK, BPF_ADJ_ROOM_ENCAP_L2_SHIFT, BPF_F_ADJ_ROOM_ENCAP_L3_IPV4, BPF_F_ADJ_ROOM_ENCAP_L4_UDP,
        BPF_F_ADJ_ROOM_FIXED_GSO, BPF_F_RECOMPUTE_CSUM, bpf_adj_room_mode::BPF_ADJ_ROOM_MAC,
    },
    helpers::bpf_skb_change_head,
};
use raven_common::{
    OVERLAY_OVERHEAD, OVERLAY_SOURCE_MAC,
    header::{ETH_LEN, ETH_P_IP, Ethernet, Ip, OverlayHeader},
};

use crate::parse::Skb;

/// A redirect is still a router's hop: takes one off TTL or hop limit. The caller knows that it is above 1.
#[inline(always)]
pub fn take_hop<I: Ip>(skb: &Skb, l3: usize, header: &I) -> Result<(), ()> {
    let hop = header.hop();
    let offset = l3 + hop.offset;
    // Two calls and not a length that varies: what is stored must have a size that the verifier knows.
    let stored = if I::LEN == 20 {
        skb.ctx.store(offset, &hop.bytes, BPF_F_RECOMPUTE_CSUM as u64)
    } else {
        skb.ctx.store(offset, &hop.bytes[0], BPF_F_RECOMPUTE_CSUM as u64)
    };
    stored.map_err(|_| ())
}

/// SYN flag of TCP.
const TCP_SYN: u8 = 0x02;
/// Options of TCP (RFC 9293): end of list, no operation, maximum segment size.
const TCP_OPT_END: u8 = 0;
const TCP_OPT_NOP: u8 = 1;
const TCP_OPT_MSS: u8 = 2;
/// Kind, length and two bytes of value.
const TCP_OPT_MSS_LEN: u8 = 4;
/// Options that are looked at before we give up: 40 bytes of options are at most 20 two-byte ones, and senders put
/// the MSS first.
const MAX_OPTIONS: usize = 20;

/// Lowers the MSS option of a SYN (or SYN-ACK) to what fits into `mtu`. Everything else is left alone, and so is a
/// SYN whose options cannot be read: the path still has ICMP.
#[inline(always)]
pub fn clamp_mss<I: Ip>(skb: &Skb, l3: usize, header: &I, mtu: u32) {
    let Some(tcp) = header.tcp_offset() else { return };
    let tcp = l3 + tcp;
    let Ok(flags) = skb.ctx.load::<u8>(tcp + 13) else { return };
    if flags & TCP_SYN != 0 {
        clamp_mss_of_syn(skb, tcp, (mtu as u16).wrapping_sub(I::LEN as u16 + 20));
    }
}

/// The rare part, out of line: it runs once per connection and direction.
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
            // The value must lie within the options: behind them is what the SYN carries (TCP Fast Open).
            TCP_OPT_MSS if len == TCP_OPT_MSS_LEN && at + 4 <= end => return lower_mss(skb, tcp, at + 2, limit),
            // Another length of the MSS, or one below 2, which would not move on: nonsense, left to the receiver.
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
    // The option may start at an odd byte (after one NOP): its bytes then stand in two words of the sum, swapped.
    let odd = (at - tcp) & 1 == 1;
    let word = |b: [u8; 2]| if odd { u16::from_ne_bytes([b[1], b[0]]) } else { u16::from_ne_bytes(b) };
    skb.ctx.l4_csum_replace(tcp + 16, word(old) as u64, word(new) as u64, 2).ok()?;
    skb.ctx.store(at, &new, 0).ok()
}

/// The stack gives an overlay packet this node's own (that is, everybody's) address as its source.
#[inline(always)]
pub fn set_overlay_source(skb: &Skb) -> Result<(), ()> {
    skb.ctx.store(6, &OVERLAY_SOURCE_MAC, 0).map_err(|_| ())
}

/// Puts an Ethernet header in front of a packet from an L3 device. What is in it comes later, or from the neighbour table.
#[inline(always)]
pub fn push_ethernet(skb: &Skb) -> Result<(), ()> {
    // SAFETY: a helper call on the program's own context; every pointer into the packet is dead here.
    if unsafe { bpf_skb_change_head(skb.raw(), ETH_LEN as u32, 0) } == 0 { Ok(()) } else { Err(()) }
}

/// Fills the Ethernet header of a packet for `raven0`.
#[inline(always)]
pub fn set_ethernet(skb: &Skb, ethertype: u16) -> Result<(), ()> {
    skb.ctx.store(0, &Ethernet::overlay(ethertype), 0).map_err(|_| ())
}

/// An outer Ethernet header (whose addresses the neighbour table will know) and what comes behind it: one write, not two.
#[repr(C)]
#[derive(Clone, Copy)]
struct Outer {
    ethernet: Ethernet,
    overlay: OverlayHeader,
}

/// Wraps the packet (which has an empty Ethernet header by now) into the overlay's outer header. Aggregates stay aggregates:
/// the flags tell the kernel where the inner packet starts, so it can cut them up behind us.
#[inline(always)]
pub fn wrap(skb: &Skb, header: &OverlayHeader) -> Result<(), ()> {
    let flags = (BPF_F_ADJ_ROOM_FIXED_GSO | BPF_F_ADJ_ROOM_ENCAP_L3_IPV4 | BPF_F_ADJ_ROOM_ENCAP_L4_UDP) as u64
        | (ETH_LEN as u64 & BPF_ADJ_ROOM_ENCAP_L2_MASK as u64) << BPF_ADJ_ROOM_ENCAP_L2_SHIFT;
    skb.ctx.adjust_room(OVERLAY_OVERHEAD as i32, BPF_ADJ_ROOM_MAC, flags).map_err(|_| ())?;
    skb.ctx.store(0, &Outer { ethernet: Ethernet::overlay(ETH_P_IP), overlay: *header }, 0).map_err(|_| ())
}
