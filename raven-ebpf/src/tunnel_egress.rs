//! TC egress of `raven-wg0`: what this gateway node and its own pods send, by way of the stack. Lowers the MSS of SYNs, as
//! [`crate::overlay_egress`] does on ordinary nodes, and counts.
//!
//! What a redirect sent here has another source than this node's and is left alone.

use raven_common::{
    Verdict,
    header::{Ipv4, Ipv6},
};

use crate::{
    count::Seen,
    maps::{self, Tables},
    parse::{Family, Skb},
    rewrite,
};

const L3: usize = 0;

/// `None`: a redirected packet, counted where it was redirected.
#[inline(always)]
pub fn run(skb: &Skb) -> Option<Result<Seen, Seen>> {
    match skb.family() {
        Ok(Family::V4) => from_stack::<Ipv4>(skb),
        Ok(Family::V6) => from_stack::<Ipv6>(skb),
        Err(seen) => Some(Err(seen)),
    }
}

#[inline(always)]
fn from_stack<I: Tables>(skb: &Skb) -> Option<Result<Seen, Seen>> {
    // Redirected packets came in by a device; the kernel notes which. The node's own packets have none, its pods'
    // packets the bridge's: so the ingress device tells nothing, and the source must.
    let config = maps::config();
    let header: I = match skb.ip(L3) {
        Ok(header) => header,
        Err(seen) => return Some(Err(seen)),
    };
    if I::local(header.source())?.node != config.node {
        return None;
    }
    rewrite::clamp_mss(skb, L3, &header, config.tunnel_mtu);
    let gateway = I::remote(header.destination()).map_or(0, |r| r.gateway);
    Some(Ok(Seen::new(Verdict::FromStack, gateway)))
}
