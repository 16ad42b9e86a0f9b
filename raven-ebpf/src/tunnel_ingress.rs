//! TC ingress of `raven-wg0` on a gateway node: a packet from another pool, decrypted. It starts at its IP header: the
//! device has no Ethernet.
//!
//! For another node of this pool → wrapped in place and sent there; for a third pool → back into the tunnel (relay); for
//! this node → the stack; for anybody else → dropped: a peer may reach this pool's prefixes and nothing besides.

use raven_common::{
    OVERLAY_OVERHEAD, Verdict,
    header::{Ipv4, Ipv6, OverlayHeader},
    tables::{CONFIG_NO_WRAP, CONFIG_RELAY, Config, GatewayId, Path, Remote},
};

use crate::{
    count::Seen,
    forward,
    maps::{self, Tables},
    parse::{Family, Skb},
    rewrite,
};

/// The device has no Ethernet header.
const L3: usize = 0;

/// Longest aggregate that still fits into a 16-bit length with the outer header in front.
const MAX_WRAPPED: u32 = u16::MAX as u32 - OVERLAY_OVERHEAD as u32;

/// See the module's text.
#[inline(always)]
pub fn run(skb: &Skb) -> Result<Seen, Seen> {
    match skb.family()? {
        Family::V4 => receive::<Ipv4>(skb),
        Family::V6 => receive::<Ipv6>(skb),
    }
}

#[inline(always)]
fn receive<I: Tables>(skb: &Skb) -> Result<Seen, Seen> {
    let config = maps::config();
    let header: I = skb.ip(L3)?;
    if let Some((gateway, node)) = remembered(&config, &header) {
        return to_overlay(skb, &config, &header, gateway, node);
    }
    let from = I::remote(header.source()).ok_or(Verdict::DropSourceNotRemote)?;
    match I::local(header.destination()) {
        Some(local) if local.node == config.node => Ok(Seen::new(Verdict::Delivered, from.gateway)),
        Some(local) => {
            remember(&config, &header, from.gateway, local.node);
            to_overlay(skb, &config, &header, from.gateway, local.node)
        }
        None => relay(skb, &config, &header, from),
    }
}

/// The sender's Gateway and the receiver's node, if both were looked up before.
#[inline(always)]
fn remembered<I: Tables>(config: &Config, header: &I) -> Option<(GatewayId, [u8; 4])> {
    // SAFETY: this CPU's own entry, which always exists; softirqs do not interrupt each other on a CPU.
    let known = unsafe { &*header.back()? };
    let same = known.generation == config.generation && known.source == header.source() && known.destination == header.destination();
    same.then_some((known.gateway, known.outer))
}

#[inline(always)]
fn remember<I: Tables>(config: &Config, header: &I, gateway: GatewayId, node: [u8; 4]) {
    if let Some(path) = header.back() {
        let known =
            Path { generation: config.generation, gateway, outer: node, source: header.source(), destination: header.destination() };
        // SAFETY: as in `remembered`.
        unsafe { *path = known };
    }
}

#[inline(always)]
fn to_overlay<I: Tables>(skb: &Skb, config: &Config, header: &I, gateway: GatewayId, node: [u8; 4]) -> Result<Seen, Seen> {
    let seen = |verdict| Seen::new(verdict, gateway);
    if header.ttl() <= 1 {
        return Err(seen(Verdict::StackTtl));
    }
    let len = skb.len();
    if len > MAX_WRAPPED || !skb.fits(L3, header, config.tunnel_mtu) {
        return Err(seen(Verdict::StackTooBig));
    }
    let hash = skb.flow_hash();
    rewrite::take_hop(skb, L3, header).map_err(|()| seen(Verdict::StackRewriteFailed))?;
    rewrite::push_ethernet(skb).map_err(|()| seen(Verdict::StackRewriteFailed))?;
    let outer = OverlayHeader::new(config.node, node, len as u16, I::ETHERTYPE, header.traffic_class(), hash);
    let wrapped = if config.flags & CONFIG_NO_WRAP == 0 { rewrite::wrap(skb, &outer) } else { Err(()) };
    match wrapped {
        Ok(()) => {
            forward::redirect_neigh(config.uplink_ifindex);
            Ok(seen(Verdict::ToOverlay))
        }
        Err(()) => {
            // This packet cannot be wrapped in place: let `raven0` do it.
            rewrite::set_ethernet(skb, I::ETHERTYPE).map_err(|()| seen(Verdict::DropMalformed))?;
            forward::set_tunnel_key(skb, node, header.traffic_class()).map_err(|()| seen(Verdict::DropNoGateway))?;
            forward::redirect(config.overlay_ifindex);
            Ok(seen(Verdict::ToOverlayKey))
        }
    }
}

#[inline(always)]
fn relay<I: Tables>(skb: &Skb, config: &Config, header: &I, from: Remote) -> Result<Seen, Seen> {
    let Some(to) = I::remote(header.destination()) else {
        return Err(Seen::new(Verdict::DropNoRoute, from.gateway));
    };
    let seen = |verdict| Seen::new(verdict, to.gateway);
    if to.gateway == from.gateway {
        return Err(seen(Verdict::DropRelayLoop));
    }
    if config.flags & CONFIG_RELAY == 0 {
        return Err(seen(Verdict::DropNoRoute));
    }
    if header.ttl() <= 1 {
        return Err(seen(Verdict::StackTtl));
    }
    if !skb.fits(L3, header, config.tunnel_mtu) {
        return Err(seen(Verdict::StackTooBig));
    }
    rewrite::take_hop(skb, L3, header).map_err(|()| seen(Verdict::StackRewriteFailed))?;
    forward::redirect(config.tunnel_ifindex);
    Ok(seen(Verdict::Relayed))
}
