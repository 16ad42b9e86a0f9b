//! TC ingress of `raven0`: checks the sender of a packet and whether it may send it.
//!
//! - On a member: a packet from a gateway node of this pool, with a source in another pool, passes to the stack with
//!   kube-proxy and the CNI's policy.
//! - On a gateway node, as the fallback tier: a packet from a node of this pool, with a source that this node owns, is
//!   redirected into the tunnel.
//! - On a proxy's node: a packet from a node of this pool to another pool's kubelet passes to the stack, where
//!   [`mod@crate::kubelet_lookup`] assigns the connection to the proxy.
//!
//! In a pool with encryption, only the last of these is an overlay packet: all others are dropped.

use raven_common::{
    OVERLAY_VNI, Verdict,
    header::{ETH_LEN, Ipv4, Ipv6},
    tables::{CONFIG_ENCRYPTED, CONFIG_TUNNEL_REDIRECT, Config, NODE_IS_GATEWAY, Node, Remote},
};

use crate::{
    count::Decision,
    forward,
    maps::{self, Tables},
    parse::{Family, Skb},
    rewrite,
};

/// Checks a packet and returns the verdict.
#[inline(always)]
pub fn run(skb: &Skb) -> Result<Decision, Decision> {
    let config = maps::config();
    let outer = forward::tunnel_key(skb, &config).ok_or(Verdict::DropNoTunnelKey)?;
    if outer.vni != OVERLAY_VNI {
        return Err(Verdict::DropWrongVni.into());
    }
    let source = outer.source.ok_or(Verdict::DropOuterNotInPool)?;
    let node = maps::node(&source).ok_or(Verdict::DropOuterNotInPool)?;
    match skb.family()? {
        Family::V4 => admit::<Ipv4>(skb, &config, source, node),
        Family::V6 => admit::<Ipv6>(skb, &config, source, node),
    }
}

#[inline(always)]
fn admit<I: Tables>(skb: &Skb, config: &Config, outer: [u8; 4], node: Node) -> Result<Decision, Decision> {
    let header: I = skb.ip(ETH_LEN)?;
    match I::local(header.source()) {
        Some(owner) if owner.node == outer => from_member(skb, config, &header),
        Some(_) => Err(Verdict::DropSpoofedInner.into()),
        // The node's own address may be used for connections to the proxy only.
        None if header.is_from(outer) && is_for_proxy(skb, &header) => Ok(Verdict::ToProxy.into()),
        None => from_gateway(config, &header, node),
    }
}

/// A packet from another pool, forwarded by a gateway node: passes to the stack if the destination is on this node.
#[inline(always)]
fn from_gateway<I: Tables>(config: &Config, header: &I, node: Node) -> Result<Decision, Decision> {
    let remote = I::remote(header.source()).ok_or(Verdict::DropSpoofedInner)?;
    let decision = |verdict| Decision::new(verdict, remote.gateway);
    if config.flags & CONFIG_ENCRYPTED != 0 {
        return Err(decision(Verdict::DropNotEncrypted));
    }
    if node.flags & NODE_IS_GATEWAY == 0 {
        return Err(decision(Verdict::DropNotFromGateway));
    }
    match I::local(header.destination()) {
        Some(local) if local.node == config.node => Ok(decision(Verdict::Delivered)),
        _ => Err(decision(Verdict::DropNoRoute)),
    }
}

#[inline(always)]
fn is_for_proxy<I: Tables>(skb: &Skb, header: &I) -> bool {
    skb.tcp_port(ETH_LEN, header).is_some_and(|port| header.is_for_proxy(port))
}

/// A packet from a node of this pool: goes into the tunnel or to the proxy. A node may have only one of the two.
#[inline(always)]
fn from_member<I: Tables>(skb: &Skb, config: &Config, header: &I) -> Result<Decision, Decision> {
    let encrypted = config.flags & CONFIG_ENCRYPTED != 0;
    let remote = I::remote(header.destination()).filter(|_| config.tunnel_ifindex != 0 && !encrypted);
    match remote {
        Some(remote) => into_tunnel(skb, config, header, remote),
        None if is_for_proxy(skb, header) => Ok(Verdict::ToProxy.into()),
        None if encrypted => Err(Verdict::DropNotEncrypted.into()),
        None if config.tunnel_ifindex != 0 => Err(Verdict::StackNotRemote.into()),
        None => Err(Verdict::DropNotFromGateway.into()),
    }
}

#[inline(always)]
fn into_tunnel<I: Tables>(skb: &Skb, config: &Config, header: &I, remote: Remote) -> Result<Decision, Decision> {
    let decision = |verdict| Decision::new(verdict, remote.gateway);
    if header.ttl() <= 1 {
        return Err(decision(Verdict::StackTtl));
    }
    if !skb.fits(ETH_LEN, header, config.tunnel_mtu) {
        return Err(decision(Verdict::StackTooBig));
    }
    if config.flags & CONFIG_TUNNEL_REDIRECT == 0 {
        return Err(decision(Verdict::StackNoRedirect));
    }
    rewrite::take_hop(skb, ETH_LEN, header).map_err(|()| decision(Verdict::StackRewriteFailed))?;
    forward::redirect(config.tunnel_ifindex);
    Ok(decision(Verdict::ToTunnel))
}
