//! TC egress of `raven0` on an ordinary node: another pool's prefix → the gateway node of this pool that carries it.
//!
//! Receives what the route of table 9027 sent here, with an Ethernet header; gives it a tunnel key and lets it go. Never
//! decides about NetworkPolicy: the stack and the CNI have seen the packet already.
//!
//! On a gateway node nothing comes here but what [`crate::tunnel_ingress`] could not wrap in place and redirected here with a
//! tunnel key: it goes on as it is.

use raven_common::{
    Verdict,
    header::{ETH_LEN, Ipv4, Ipv6},
    tables::{Config, Remote},
};

use crate::{
    count::Seen,
    forward,
    maps::{self, Tables},
    parse::{Family, Skb},
    rewrite,
};

/// `None`: a redirected packet, counted where it was redirected.
#[inline(always)]
pub fn run(skb: &Skb) -> Option<Result<Seen, Seen>> {
    match skb.family() {
        Ok(Family::V4) => leave::<Ipv4>(skb),
        Ok(Family::V6) => leave::<Ipv6>(skb),
        Err(seen) => Some(Err(seen)),
    }
}

#[inline(always)]
fn leave<I: Tables>(skb: &Skb) -> Option<Result<Seen, Seen>> {
    let config = maps::config();
    let header: I = match skb.ip(ETH_LEN) {
        Ok(header) => header,
        Err(seen) => return Some(Err(seen)),
    };
    match I::remote(header.destination()) {
        Some(remote) => Some(encapsulate(skb, &config, &header, remote)),
        // A gateway node's fallback: it has its key and its check already, and its destination is in this pool.
        None if config.tunnel_ifindex != 0 && I::local(header.destination()).is_some() => None,
        None if header.is_multicast() => Some(Ok(Verdict::Multicast.into())),
        None => Some(Err(Verdict::DropNoRoute.into())),
    }
}

/// From the node's own address (one without pods has no other) to a kubelet of another pool: the proxy's node takes it.
#[inline(always)]
fn own_to_proxy<I: Tables>(skb: &Skb, config: &Config, header: &I) -> bool {
    header.is_from(config.node) && skb.tcp_port(ETH_LEN, header).is_some_and(|port| header.is_for_proxy(port))
}

#[inline(always)]
fn encapsulate<I: Tables>(skb: &Skb, config: &Config, header: &I, remote: Remote) -> Result<Seen, Seen> {
    let seen = |verdict| Seen::new(verdict, remote.gateway);
    // The gateway node would drop it as spoofed; here, where the cause is (a masquerading CNI), it is easier to find.
    if I::local(header.source()).is_none_or(|l| l.node != config.node) && !own_to_proxy(skb, config, header) {
        return Err(seen(Verdict::DropSourceNotMine));
    }
    if remote.via == [0; 4] {
        return Err(seen(Verdict::DropNoGateway));
    }
    rewrite::clamp_mss(skb, ETH_LEN, header, config.tunnel_mtu);
    rewrite::set_overlay_source(skb).map_err(|()| seen(Verdict::DropMalformed))?;
    forward::set_tunnel_key(skb, remote.via, header.traffic_class()).map_err(|()| seen(Verdict::DropNoGateway))?;
    Ok(seen(Verdict::Encapsulated))
}
