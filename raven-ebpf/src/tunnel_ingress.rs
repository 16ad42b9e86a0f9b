//! TC ingress of `raven-wg0` on a gateway node: a decrypted packet from another pool. It starts at its IP header,
//! because the device has no Ethernet header.
//!
//! A packet for another node of this pool is wrapped in place and sent there; one for a third pool is redirected
//! back into the tunnel (relay); one for this node passes to the stack. All others are dropped: a peer may reach
//! this pool's prefixes only.
//!
//! In a pool with encryption, the other nodes of the pool are peers, too. Their packets, and those for them, are
//! redirected back into the tunnel.

use raven_common::{
    OVERLAY_OVERHEAD, Verdict,
    header::{Ipv4, Ipv6, OverlayHeader},
    tables::{CONFIG_ENCRYPTED, CONFIG_NO_WRAP, CONFIG_RELAY, Config, GatewayId, Path, Remote},
};

use crate::{
    count::Decision,
    forward,
    maps::{self, Tables},
    parse::{Family, Skb},
    rewrite,
};

/// Offset of the IP header: the device has no Ethernet header.
const L3: usize = 0;

/// Length of the longest aggregate that fits into the outer header's 16-bit length field.
const MAX_WRAPPED: u32 = u16::MAX as u32 - OVERLAY_OVERHEAD as u32;

/// Processes a packet and returns the verdict.
#[inline(always)]
pub fn run(skb: &Skb) -> Result<Decision, Decision> {
    match skb.family()? {
        Family::V4 => receive::<Ipv4>(skb),
        Family::V6 => receive::<Ipv6>(skb),
    }
}

#[inline(always)]
fn receive<I: Tables>(skb: &Skb) -> Result<Decision, Decision> {
    let config = maps::config();
    let header: I = skb.ip(L3)?;
    if config.flags & CONFIG_ENCRYPTED != 0 {
        return encrypted(skb, &config, &header);
    }
    if let Some((gateway, node)) = cached(&config, &header) {
        return to_overlay(skb, &config, &header, gateway, node);
    }
    let from = I::remote(header.source()).ok_or(Verdict::DropSourceNotRemote)?;
    match I::local(header.destination()) {
        Some(local) if local.node == config.node => Ok(Decision::new(Verdict::Delivered, from.gateway)),
        Some(local) => {
            cache(&config, &header, from.gateway, local.node);
            to_overlay(skb, &config, &header, from.gateway, local.node)
        }
        None => relay(skb, &config, &header, from),
    }
}

/// Returns the sender's Gateway and the receiver's node if the cache has a valid entry for the packet's addresses.
#[inline(always)]
fn cached<I: Tables>(config: &Config, header: &I) -> Option<(GatewayId, [u8; 4])> {
    // SAFETY: this CPU's own entry, which always exists; softirqs do not interrupt each other on a CPU.
    let entry = unsafe { &*header.back()? };
    let same = entry.generation == config.generation
        && entry.source == header.source()
        && entry.destination == header.destination();
    same.then_some((entry.gateway, entry.outer))
}

#[inline(always)]
fn cache<I: Tables>(config: &Config, header: &I, gateway: GatewayId, node: [u8; 4]) {
    if let Some(path) = header.back() {
        let entry = Path {
            generation: config.generation,
            gateway,
            outer: node,
            source: header.source(),
            destination: header.destination(),
        };
        // SAFETY: as in `cached`.
        unsafe { *path = entry };
    }
}

#[inline(always)]
fn to_overlay<I: Tables>(
    skb: &Skb,
    config: &Config,
    header: &I,
    gateway: GatewayId,
    node: [u8; 4],
) -> Result<Decision, Decision> {
    let decision = |verdict| Decision::new(verdict, gateway);
    if header.ttl() <= 1 {
        return Err(decision(Verdict::StackTtl));
    }
    let len = skb.len();
    if len > MAX_WRAPPED || !skb.fits(L3, header, config.tunnel_mtu) {
        return Err(decision(Verdict::StackTooBig));
    }
    let hash = skb.flow_hash();
    rewrite::take_hop(skb, L3, header).map_err(|()| decision(Verdict::StackRewriteFailed))?;
    rewrite::push_ethernet(skb).map_err(|()| decision(Verdict::StackRewriteFailed))?;
    let outer = OverlayHeader::new(config.node, node, len as u16, I::ETHERTYPE, header.traffic_class(), hash);
    let wrapped = if config.flags & CONFIG_NO_WRAP == 0 { rewrite::wrap(skb, &outer) } else { Err(()) };
    match wrapped {
        Ok(()) => {
            forward::redirect_neigh(config.uplink_ifindex);
            Ok(decision(Verdict::ToOverlay))
        }
        Err(()) => {
            // This packet cannot be wrapped in place; `raven0` encapsulates it.
            rewrite::set_ethernet(skb, I::ETHERTYPE).map_err(|()| decision(Verdict::DropMalformed))?;
            forward::set_tunnel_key(skb, config, node, header.traffic_class())
                .map_err(|()| decision(Verdict::DropNoGateway))?;
            forward::redirect(config.overlay_ifindex);
            Ok(decision(Verdict::ToOverlayKey))
        }
    }
}

#[inline(always)]
fn relay<I: Tables>(skb: &Skb, config: &Config, header: &I, from: Remote) -> Result<Decision, Decision> {
    let Some(to) = I::remote(header.destination()) else {
        return Err(Decision::new(Verdict::DropNoRoute, from.gateway));
    };
    let decision = |verdict| Decision::new(verdict, to.gateway);
    if to.gateway == from.gateway {
        return Err(decision(Verdict::DropRelayLoop));
    }
    if config.flags & CONFIG_RELAY == 0 {
        return Err(decision(Verdict::DropNoRoute));
    }
    into_tunnel(skb, config, header, config.tunnel_mtu, decision(Verdict::Relayed))
}

/// A packet in a pool with encryption. WireGuard has checked that its source belongs to the peer.
#[inline(always)]
fn encrypted<I: Tables>(skb: &Skb, config: &Config, header: &I) -> Result<Decision, Decision> {
    match (I::remote(header.source()), I::local(header.destination())) {
        (Some(from), Some(local)) if local.node == config.node => Ok(Decision::new(Verdict::Delivered, from.gateway)),
        // Not to the stack, which would forward it on the LAN in clear, except to answer an exhausted TTL. One that is too long
        // is fragmented after its encryption.
        (Some(from), Some(_)) => {
            let decision = |verdict| Decision::new(verdict, from.gateway);
            into_tunnel(skb, config, header, u32::MAX, decision(Verdict::ToMember)).map_err(|e| match e.verdict {
                Verdict::StackRewriteFailed => decision(Verdict::DropMalformed),
                _ => e,
            })
        }
        (Some(from), None) => relay(skb, config, header, from),
        (None, _) => {
            I::local(header.source()).ok_or(Verdict::DropSourceNotRemote)?;
            let to = I::remote(header.destination()).ok_or(Verdict::DropNoRoute)?;
            into_tunnel(skb, config, header, config.tunnel_mtu, Decision::new(Verdict::FromMember, to.gateway))
        }
    }
}

/// Redirects a packet of at most `mtu` bytes to the egress of the tunnel, where WireGuard selects the peer by the
/// destination. The stack answers one that is longer, or whose TTL is exhausted.
#[inline(always)]
fn into_tunnel<I: Tables>(
    skb: &Skb,
    config: &Config,
    header: &I,
    mtu: u32,
    done: Decision,
) -> Result<Decision, Decision> {
    let decision = |verdict| Decision::new(verdict, done.gateway);
    if header.ttl() <= 1 {
        return Err(decision(Verdict::StackTtl));
    }
    if !skb.fits(L3, header, mtu) {
        return Err(decision(Verdict::StackTooBig));
    }
    rewrite::take_hop(skb, L3, header).map_err(|()| decision(Verdict::StackRewriteFailed))?;
    forward::redirect(config.tunnel_ifindex);
    Ok(done)
}
