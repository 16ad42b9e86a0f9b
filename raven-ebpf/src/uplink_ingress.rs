//! TC ingress of a gateway node's uplink: what [`crate::uplink_xdp`] unwrapped (and GRO has joined since) goes straight
//! into the tunnel: no UDP receive, no VXLAN device, no routing table, no netfilter, no conntrack.
//!
//! Receives every packet of the uplink and is done with a stranger after three instructions; where there is no XDP program
//! of ours in front, the guard runs here.

use raven_common::{
    OVERLAY_PORT, Verdict,
    header::{ETH_LEN, IPPROTO_UDP, Ip, Ipv4},
    tables::{CONFIG_TC_GUARD, GatewayId, UNWRAPPED_MAGIC, Unwrapped},
};

use crate::{
    count::Seen,
    forward,
    guard::{self, Message},
    maps,
    parse::{Family, Skb},
};

/// `None`: not ours.
#[inline(always)]
pub fn run(skb: &Skb) -> Option<Result<Seen, Seen>> {
    let Some(gateway) = unwrapped(skb) else { return refuse(skb).map(|verdict| Err(verdict.into())) };
    // XDP has checked the packet and taken its hop; a tunnel that went away in between leaves it to the stack.
    let config = maps::config();
    if config.tunnel_ifindex == 0 {
        return Some(Err(Seen::new(Verdict::StackNoRedirect, gateway)));
    }
    forward::redirect(config.tunnel_ifindex);
    Some(Ok(Seen::new(Verdict::ToTunnelFast, gateway)))
}

/// The note that XDP left. It is read and never written: a program that writes to a packet directly gets a private copy
/// when somebody else looks at the packet, too (tcpdump, a DHCP client), and the kernel makes that copy without the note.
/// Nobody behind us takes it for theirs: what has a note is redirected, as long as there is a tunnel.
#[inline(always)]
fn unwrapped(skb: &Skb) -> Option<GatewayId> {
    // SAFETY: the context is valid; the verifier rewrites the loads.
    let (start, end) = unsafe { ((*skb.raw()).data_meta as usize, (*skb.raw()).data as usize) };
    if start + size_of::<Unwrapped>() > end {
        return None;
    }
    // SAFETY: the bounds were checked; the area is aligned to 4, and any bytes are a value.
    let note = unsafe { *(start as *const Unwrapped) };
    (note.magic == UNWRAPPED_MAGIC).then_some(note.gateway)
}

/// The guard, where no XDP program of ours is in front: the same checks of what comes for this node by UDP.
#[inline(always)]
fn refuse(skb: &Skb) -> Option<Verdict> {
    let config = maps::config();
    if config.flags & CONFIG_TC_GUARD == 0 || !matches!(skb.family(), Ok(Family::V4)) {
        return None;
    }
    let ip: Ipv4 = skb.ctx.load(ETH_LEN).ok()?;
    if ip.version_ihl != 0x45 || ip.protocol != IPPROTO_UDP || ip.is_fragment() || ip.destination != config.node {
        return None;
    }
    let udp = ETH_LEN + Ipv4::LEN;
    let [_, _, high, low] = skb.ctx.load::<[u8; 4]>(udp).ok()?;
    match u16::from_be_bytes([high, low]) {
        OVERLAY_PORT => maps::node(&ip.source).is_none().then_some(Verdict::DropOuterNotInPool),
        port if u32::from(port) == config.tunnel_port => {
            let Ok(head) = skb.ctx.load(udp + 8) else { return Some(Verdict::DropNotWireguard) };
            let len = (ip.total_len() as u16).wrapping_sub(Ipv4::LEN as u16 + 8);
            guard::refuse(&Message { source: ip.source, head, len: (!skb.is_aggregate()).then_some(len) })
        }
        _ => None,
    }
}
