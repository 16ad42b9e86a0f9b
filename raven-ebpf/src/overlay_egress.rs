//! TC egress of `raven0` on a member: sends packets for another pool's prefix to the gateway node
//! that carries the prefix.
//!
//! The route of table 9027 sends packets here, with an Ethernet header; the program sets the tunnel key. It does not
//! interfere with NetworkPolicy: the stack and the CNI have already processed the packet.
//!
//! On a gateway node, the device receives only packets that [`mod@crate::tunnel_ingress`] could not wrap in place and
//! redirected here with a tunnel key. They pass unchanged.

use raven_common::{
    Verdict,
    header::{ETH_LEN, Ipv4, Ipv6},
    tables::{Config, Remote},
};

use crate::{
    count::Decision,
    forward,
    maps::{self, Tables},
    parse::{Family, Skb},
    rewrite,
};

/// Returns `None` for a redirected packet, which has been counted where it was redirected.
#[inline(always)]
pub fn run(skb: &Skb) -> Option<Result<Decision, Decision>> {
    match skb.family() {
        Ok(Family::V4) => leave::<Ipv4>(skb),
        Ok(Family::V6) => leave::<Ipv6>(skb),
        Err(decision) => Some(Err(decision)),
    }
}

#[inline(always)]
fn leave<I: Tables>(skb: &Skb) -> Option<Result<Decision, Decision>> {
    let config = maps::config();
    let header: I = match skb.ip(ETH_LEN) {
        Ok(header) => header,
        Err(decision) => return Some(Err(decision)),
    };
    match I::remote(header.destination()) {
        Some(remote) => Some(encapsulate(skb, &config, &header, remote)),
        // Fallback path of a gateway node: the packet has its key, was checked before, and its destination
        // is in this pool.
        None if config.tunnel_ifindex != 0 && I::local(header.destination()).is_some() => None,
        None if header.is_multicast() => Some(Ok(Verdict::Multicast.into())),
        None => Some(Err(Verdict::DropNoRoute.into())),
    }
}

/// Reports whether the packet goes from the node's own address (a node without pods has no other)
/// to an intercepted kubelet.
#[inline(always)]
fn own_to_proxy<I: Tables>(skb: &Skb, config: &Config, header: &I) -> bool {
    header.is_from(config.node) && skb.tcp_port(ETH_LEN, header).is_some_and(|port| header.is_for_proxy(port))
}

#[inline(always)]
fn encapsulate<I: Tables>(skb: &Skb, config: &Config, header: &I, remote: Remote) -> Result<Decision, Decision> {
    let decision = |verdict| Decision::new(verdict, remote.gateway);
    // The gateway node would drop the packet as spoofed. Dropping it here points to the cause: a CNI that masquerades.
    if I::local(header.source()).is_none_or(|l| l.node != config.node) && !own_to_proxy(skb, config, header) {
        return Err(decision(Verdict::DropSourceNotMine));
    }
    if remote.via == [0; 4] {
        return Err(decision(Verdict::DropNoGateway));
    }
    rewrite::clamp_mss(skb, ETH_LEN, header, config.tunnel_mtu);
    rewrite::set_overlay_source(skb).map_err(|()| decision(Verdict::DropMalformed))?;
    forward::set_tunnel_key(skb, config, remote.via, header.traffic_class())
        .map_err(|()| decision(Verdict::DropNoGateway))?;
    Ok(decision(Verdict::Encapsulated))
}
