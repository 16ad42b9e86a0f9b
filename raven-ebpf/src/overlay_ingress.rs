//! TC ingress of `raven0`: who sent this, and may they?
//!
//! On an ordinary node: from a gateway node of this pool, with a source in another pool → the stack, where kube-proxy and
//! the CNI's policy are. On a gateway node this is the fallback tier: from a node of this pool, with a source that this
//! node has → straight into the tunnel. On a proxy's node: from a node of this pool, to another pool's kubelet → the stack, where
//! [`crate::kubelet_lookup`] hands the connection to the proxy.

use raven_common::{
    OVERLAY_VNI, Verdict,
    header::{ETH_LEN, Ipv4, Ipv6},
    tables::{CONFIG_TUNNEL_REDIRECT, Config, NODE_IS_GATEWAY, Node, Remote},
};

use crate::{
    count::Seen,
    forward,
    maps::{self, Tables},
    parse::{Family, Skb},
    rewrite,
};

/// See the module's text.
#[inline(always)]
pub fn run(skb: &Skb) -> Result<Seen, Seen> {
    let outer = forward::tunnel_key(skb).ok_or(Verdict::DropNoTunnelKey)?;
    if outer.vni != OVERLAY_VNI {
        return Err(Verdict::DropWrongVni.into());
    }
    let node = maps::node(&outer.source).ok_or(Verdict::DropOuterNotInPool)?;
    match skb.family()? {
        Family::V4 => admit::<Ipv4>(skb, outer.source, node),
        Family::V6 => admit::<Ipv6>(skb, outer.source, node),
    }
}

#[inline(always)]
fn admit<I: Tables>(skb: &Skb, outer: [u8; 4], node: Node) -> Result<Seen, Seen> {
    let config = maps::config();
    let header: I = skb.ip(ETH_LEN)?;
    match I::local(header.source()) {
        Some(owner) if owner.node == outer => from_member(skb, &config, &header),
        Some(_) => Err(Verdict::DropSpoofedInner.into()),
        // The node itself, by its own address: to the proxy it may, and nowhere else.
        None if header.is_from(outer) && is_for_proxy(skb, &header) => Ok(Verdict::ToProxy.into()),
        None => from_gateway(&config, &header, node),
    }
}

/// From another pool, brought by a gateway node: for the stack, if the destination lives here.
#[inline(always)]
fn from_gateway<I: Tables>(config: &Config, header: &I, node: Node) -> Result<Seen, Seen> {
    let remote = I::remote(header.source()).ok_or(Verdict::DropSpoofedInner)?;
    let seen = |verdict| Seen::new(verdict, remote.gateway);
    if node.flags & NODE_IS_GATEWAY == 0 {
        return Err(seen(Verdict::DropNotFromGateway));
    }
    match I::local(header.destination()) {
        Some(local) if local.node == config.node => Ok(seen(Verdict::Delivered)),
        _ => Err(seen(Verdict::DropNoRoute)),
    }
}

#[inline(always)]
fn is_for_proxy<I: Tables>(skb: &Skb, header: &I) -> bool {
    skb.tcp_port(ETH_LEN, header).is_some_and(|port| header.is_for_proxy(port))
}

/// From a node of this pool: into the tunnel, or to the proxy. (Either may be on a node without the other.)
#[inline(always)]
fn from_member<I: Tables>(skb: &Skb, config: &Config, header: &I) -> Result<Seen, Seen> {
    let remote = I::remote(header.destination()).filter(|_| config.tunnel_ifindex != 0);
    match remote {
        Some(remote) => into_tunnel(skb, config, header, remote),
        None if is_for_proxy(skb, header) => Ok(Verdict::ToProxy.into()),
        None if config.tunnel_ifindex != 0 => Err(Verdict::StackNotRemote.into()),
        None => Err(Verdict::DropNotFromGateway.into()),
    }
}

#[inline(always)]
fn into_tunnel<I: Tables>(skb: &Skb, config: &Config, header: &I, remote: Remote) -> Result<Seen, Seen> {
    let seen = |verdict| Seen::new(verdict, remote.gateway);
    if header.ttl() <= 1 {
        return Err(seen(Verdict::StackTtl));
    }
    if !skb.fits(ETH_LEN, header, config.tunnel_mtu) {
        return Err(seen(Verdict::StackTooBig));
    }
    if config.flags & CONFIG_TUNNEL_REDIRECT == 0 {
        return Err(seen(Verdict::StackNoRedirect));
    }
    rewrite::take_hop(skb, ETH_LEN, header).map_err(|()| seen(Verdict::StackRewriteFailed))?;
    forward::redirect(config.tunnel_ifindex);
    Ok(seen(Verdict::ToTunnel))
}
