//! Samples of dropped packets, which show individual packets in addition to the counters.

use core::mem::MaybeUninit;

use aya_ebpf::{helpers::bpf_ktime_get_ns, programs::XdpContext};
use raven_common::{
    header::{ETH_LEN, ETH_P_IP, ETH_P_IPV6, Ethernet, IPPROTO_TCP, IPPROTO_UDP, Ip, Ipv4, Ipv6},
    tables::{DropSample, SAMPLE_PERIOD_NS},
};

use crate::{
    count::Decision,
    frame,
    maps::{EVENTS, SAMPLED},
    parse::{Family, Skb},
};

/// Returns the current time if this CPU may write a sample now, and starts the next period.
#[inline(always)]
fn due() -> Option<u64> {
    // SAFETY: a helper call without arguments.
    let now = unsafe { bpf_ktime_get_ns() };
    let last = SAMPLED.get_ptr_mut(0)?;
    // SAFETY: this CPU's own value, which always exists.
    unsafe {
        if now.wrapping_sub(*last) < SAMPLE_PERIOD_NS {
            return None;
        }
        *last = now;
    }
    Some(now)
}

/// Initialises a sample in the ring buffer. Zeroed by words: a call of `memset` would be a third stack frame in the
/// 512 bytes that all frames share on kernels before 6.13.
#[inline(always)]
fn begin(entry: &mut MaybeUninit<DropSample>, now: u64, decision: Decision, ifindex: u32, len: u32) -> &mut DropSample {
    const WORDS: usize = size_of::<DropSample>() / 8;
    const _: () = assert!(WORDS * 8 == size_of::<DropSample>() && align_of::<DropSample>() == 8);
    let words = entry.as_mut_ptr().cast::<u64>();
    for word in 0..WORDS {
        // SAFETY: the address is inside the entry and aligned.
        unsafe { words.add(word).write_volatile(0) };
    }
    // SAFETY: the whole entry was written; zero is a valid value of each field.
    let sample = unsafe { entry.assume_init_mut() };
    sample.time_ns = now;
    sample.verdict = decision.verdict as u32;
    sample.gateway = decision.gateway;
    sample.ifindex = ifindex;
    sample.len = len;
    sample
}

#[inline(always)]
fn fill4(sample: &mut DropSample, header: &Ipv4) {
    sample.ethertype = ETH_P_IP;
    sample.protocol = header.protocol;
    sample.source[..4].copy_from_slice(&header.source);
    sample.destination[..4].copy_from_slice(&header.destination);
}

#[inline(always)]
fn fill6(sample: &mut DropSample, header: &Ipv6) {
    sample.ethertype = ETH_P_IPV6;
    sample.protocol = header.next_header;
    sample.source = header.source;
    sample.destination = header.destination;
}

#[inline(always)]
fn fill_ports(sample: &mut DropSample, [a, b, c, d]: [u8; 4]) {
    (sample.source_port, sample.destination_port) = ([a, b], [c, d]);
}

#[inline(always)]
fn has_ports(protocol: u8) -> bool {
    protocol == IPPROTO_TCP || protocol == IPPROTO_UDP
}

/// Writes a sample of a packet dropped in TC, with its IP header at `l3`. Not inlined, because drops are rare. Filled
/// in place, because the caller shares the stack.
#[inline(never)]
pub fn skb(skb: &Skb, decision: Decision, l3: usize) {
    let Some(now) = due() else { return };
    // With a full buffer the sample is lost; the packet is still counted.
    let Some(mut entry) = EVENTS.reserve(0) else { return };
    let sample = begin(&mut entry, now, decision, skb.ifindex(), skb.len());
    let l4 = match skb.family() {
        Ok(Family::V4) => {
            sample.ethertype = ETH_P_IP;
            // Bytes beyond the end of the packet stay zero.
            let _ = skb.copy(l3 + 9, &mut sample.protocol);
            let _ = skb.copy(l3 + 12, &mut sample.source[..4]);
            let _ = skb.copy(l3 + 16, &mut sample.destination[..4]);
            let words = skb.ctx.load::<u8>(l3).unwrap_or(5) & 0xf;
            Some(l3 + words as usize * 4)
        }
        Ok(Family::V6) => {
            sample.ethertype = ETH_P_IPV6;
            let _ = skb.copy(l3 + 6, &mut sample.protocol);
            let _ = skb.copy(l3 + 8, &mut sample.source);
            let _ = skb.copy(l3 + 24, &mut sample.destination);
            Some(l3 + Ipv6::LEN)
        }
        Err(_) => None,
    };
    if let Some(l4) = l4.filter(|_| has_ports(sample.protocol)) {
        let _ = skb.copy(l4, &mut sample.source_port);
        let _ = skb.copy(l4 + 2, &mut sample.destination_port);
    }
    entry.submit(0);
}

/// Writes a sample of a frame dropped in XDP. It contains the outer addresses, which identify the sender.
#[inline(never)]
pub fn xdp(ctx: &XdpContext, decision: Decision) {
    let Some(now) = due() else { return };
    // SAFETY: the kernel passes a valid context to the program; the verifier rewrites the load.
    let ifindex = unsafe { (*ctx.ctx).ingress_ifindex };
    let Some(mut entry) = EVENTS.reserve(0) else { return };
    let sample = begin(&mut entry, now, decision, ifindex, (ctx.data_end() - ctx.data()) as u32);
    let ethertype = frame::read::<Ethernet>(ctx, 0).map(|ethernet| u16::from_be_bytes(ethernet.ethertype));
    // XDP drops only packets without IP options and extension headers.
    let ports = match ethertype {
        Some(ETH_P_IP) => {
            if let Some(header) = frame::read::<Ipv4>(ctx, ETH_LEN) {
                fill4(sample, &header);
            }
            frame::read::<[u8; 4]>(ctx, ETH_LEN + Ipv4::LEN)
        }
        Some(ETH_P_IPV6) => {
            if let Some(header) = frame::at::<Ipv6>(ctx, ETH_LEN) {
                // SAFETY: `at` checked the bounds. Passed by reference, to save stack.
                fill6(sample, unsafe { &*header });
            }
            frame::read::<[u8; 4]>(ctx, ETH_LEN + Ipv6::LEN)
        }
        _ => None,
    };
    if let Some(ports) = ports.filter(|_| has_ports(sample.protocol)) {
        fill_ports(sample, ports);
    }
    entry.submit(0);
}
