//! TC egress of `raven-wg0`: packets that this gateway node and its own pods send through the stack. Clamps the MSS of
//! SYNs, as [`mod@crate::overlay_egress`] does on members, and counts.
//!
//! Redirected packets have a source outside this node's prefixes and pass unchanged. In a pool with encryption, a packet with a
//! source in no pool is dropped and counted here, because WireGuard on the gateway node would drop it without a reason.

use raven_common::{
    Verdict,
    header::{Ipv4, Ipv6},
    tables::{CONFIG_ENCRYPTED, Config},
};

use crate::{
    count::Decision,
    maps::{self, Tables},
    parse::{Family, Skb},
    rewrite,
};

const L3: usize = 0;

/// Returns `None` for a redirected packet, which has been counted where it was redirected.
#[inline(always)]
pub fn run(skb: &Skb) -> Option<Result<Decision, Decision>> {
    match skb.family() {
        Ok(Family::V4) => from_stack::<Ipv4>(skb),
        Ok(Family::V6) => from_stack::<Ipv6>(skb),
        Err(decision) => Some(Err(decision)),
    }
}

#[inline(always)]
fn from_stack<I: Tables>(skb: &Skb) -> Option<Result<Decision, Decision>> {
    // The ingress device cannot distinguish the packets: redirected ones have one, the node's own have none, but those
    // of its pods have the bridge. The source address can.
    let config = maps::config();
    let header: I = match skb.ip(L3) {
        Ok(header) => header,
        Err(decision) => return Some(Err(decision)),
    };
    match I::local(header.source()) {
        Some(local) if local.node == config.node => {}
        Some(_) => return None,
        None => return not_local(&config, &header),
    }
    rewrite::clamp_mss(skb, L3, &header, config.tunnel_mtu);
    let gateway = I::remote(header.destination()).map_or(0, |r| r.gateway);
    Some(Ok(Decision::new(Verdict::FromStack, gateway)))
}

/// A packet whose source is not in this pool: a redirected one, or, with encryption, one that is dropped.
#[inline(always)]
fn not_local<I: Tables>(config: &Config, header: &I) -> Option<Result<Decision, Decision>> {
    if config.flags & CONFIG_ENCRYPTED == 0 || I::remote(header.source()).is_some() {
        return None;
    }
    if header.is_multicast() {
        return Some(Ok(Verdict::Multicast.into()));
    }
    let gateway = I::remote(header.destination()).map_or(0, |r| r.gateway);
    Some(Err(Decision::new(Verdict::DropSourceNotMine, gateway)))
}
