//! `plan(topology, me)`: the desired state of this node, for L3 and L7. Pure: the same input gives the same output,
//! byte for byte; no clock, no I/O.
//!
//! [`path`] decides how each other pool is reached and which gateway node owns which prefix; [`routes`], [`peers`] and
//! [`maps`] turn that into kernel state. [`proxy`] is the L7 part; [`interception`] connects the two: kubelet
//! connections by address that L3's overlay carries to a proxy.

#[cfg(test)]
mod fixture;
mod interception;
mod maps;
mod me;
mod path;
mod peers;
pub mod proxy;
mod rendezvous;
mod routes;

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, Ipv4Addr},
    sync::Arc,
};

use ipnet::IpNet;
use raven_common::{OVERLAY_OVERHEAD, OVERLAY_OVERHEAD6, TUNNEL_OVERHEAD};

use self::path::Protected;
pub use self::{me::Me, path::gateway_ids, proxy::ProxyPlan};
use crate::{
    state::{Config, Device, Interception, Overlay, PeerName, Role, State, TunnelDevice},
    topology::{Dial, GatewayPeer, Member, Pool, PublicKey, Topology},
};

/// The desired state of this node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Plan {
    /// What this node is to its pool.
    pub role: Role,
    /// The Gateway that it belongs to.
    pub pool: Option<String>,
    /// Device `raven0`; `None` if it must not exist.
    pub overlay: Option<Overlay>,
    /// Device `raven-wg0`; `None` if it must not exist.
    pub tunnel: Option<TunnelDevice>,
    /// Routes, peers and map entries.
    pub state: State,
    /// The programs' settings, without the interface indexes, which the drivers find.
    pub config: Config,
    /// Gateway names by id, for counters.
    pub gateway_names: BTreeMap<u32, String>,
    /// Node and Gateway of each peer, for status and logs.
    pub peer_names: BTreeMap<PublicKey, PeerName>,
    /// Kubelet connections by address that this node redirects.
    pub interception: Option<Interception>,
    /// The L7 part.
    pub proxy: Arc<ProxyPlan>,
    /// What could not be planned, one sentence each.
    pub problems: Vec<String>,
}

// === impl Plan ===

impl Plan {
    /// The prefixes of this node, with its own address where node addresses are forwarded.
    pub fn own_prefixes(&self) -> Vec<IpNet> {
        let own = self.config.node.octets();
        self.state.local.iter().filter(|(_, local)| local.node == own).map(|(prefix, _)| *prefix).collect()
    }
}

/// The plan for node `me` in this topology.
///
/// Each half works without the other. With L3 off no other pool is reached, and the overlay of an exposed pool carries
/// intercepted connections to its gateway nodes.
pub fn plan(topology: &Topology, me: &Me) -> Plan {
    let proxy = Arc::new(proxy::proxy(topology, me));
    let Some((name, pool)) = topology.pool_of(&me.node) else { return empty(me, proxy, without_pool(topology, me)) };
    let l3 = topology.settings.l3 && pool.l3;
    let member = &pool.members[&me.node];
    let prefixes = pod_prefixes(member);
    let sources: Vec<IpAddr> = prefixes.iter().map(|prefix| routes::source(prefix, &me.addresses)).collect();
    let intercepted = interception::interception(topology, (name, pool), me, member, &sources);
    if !l3 && intercepted.is_none() {
        return empty(me, proxy, Vec::new());
    }
    let own_gateway = pool.gateways.get(&me.node).filter(|_| l3);
    let role = if own_gateway.is_some() { Role::Gateway } else { Role::Member };
    let mut problems = topology.problems.clone();
    let paths = match l3 {
        true => path::paths(topology, name, pool, &protected(topology, pool, me, &prefixes), &mut problems),
        false => BTreeMap::new(),
    };
    if pool.usable().next().is_none() && role == Role::Member && !paths.is_empty() {
        problems
            .push(format!("Gateway {name} has no gateway node that has published a key: traffic to other pools is dropped on this node"));
    }
    if role == Role::Gateway {
        problems.extend(paths.iter().flat_map(|(name, path)| unresolved(name, path.pool)));
    }
    let mtu = tunnel_mtu(me);
    let encrypted = pool.encrypted && l3;
    let device = if role == Role::Gateway || encrypted { Device::Tunnel } else { Device::Overlay };
    let tunnel_port = match device {
        Device::Tunnel => member.tunnel_port,
        Device::Overlay => 0,
    };
    let mut peers = if role == Role::Gateway { peers::peers(&paths, pool, me.preshared) } else { BTreeMap::new() };
    if encrypted {
        peers.extend(peers::inside(&paths, pool, me));
        problems.extend(peers::without_key(pool, &me.node).map(|node| {
            format!(
                "Gateway {name}: the pool has encryption, and node {node} has published no WireGuard key, so its packets to and from other pools are dropped; check the log and the version of its agent"
            )
        }));
    }
    let mut state = State {
        routes: routes::routes(&paths, device, &sources, mtu),
        barriers: BTreeSet::new(),
        peers,
        remote: maps::remote(&paths, device, &me.node, pool),
        local: maps::local(pool),
        nodes: maps::nodes(pool),
        nodes6: maps::nodes6(pool),
        outer6: maps::outer6(pool),
    };
    if !me.ipv6 {
        state.routes.retain(|prefix, _| prefix.addr().is_ipv4());
    }
    state.barriers = state.routes.keys().copied().collect();
    let (mut interception, entries) = intercepted.unzip();
    for (prefix, remote) in entries.into_iter().flatten() {
        // Where L3 carries node addresses it carries these connections, too.
        state.remote.entry(prefix).or_insert(remote);
    }
    if let Some(interception) = interception.as_mut().filter(|_| device == Device::Tunnel) {
        interception.leave_to_tunnel(&state.routes);
    }
    let addresses =
        prefixes.iter().filter(|prefix| me.ipv6 || prefix.addr().is_ipv4()).map(routes::own_address).collect();
    Plan {
        role,
        pool: Some(name.to_owned()),
        overlay: Some(Overlay { mtu: overlay_mtu(member, me), addresses }),
        tunnel: (device == Device::Tunnel).then_some(TunnelDevice { mtu, port: tunnel_port }),
        state,
        config: Config {
            node: member.outer,
            address: member.address,
            tunnel_mtu: mtu,
            relay: topology.relays().iter().any(|(relay, _)| *relay == name),
            encrypted,
            tunnel_port,
        },
        gateway_names: gateway_ids(topology).into_iter().map(|(name, id)| (id, name)).collect(),
        peer_names: peers::names(topology),
        interception,
        proxy,
        problems,
    }
}

/// IPv6 allows no smaller MTU (RFC 8200 §5).
const MIN_MTU: u32 = 1280;

/// Largest inner packet in bytes that fits into the tunnel of a node with this uplink.
fn tunnel_mtu(me: &Me) -> u32 {
    let fits = me.uplink_mtu.saturating_sub(TUNNEL_OVERHEAD as u32).max(MIN_MTU);
    me.tunnel_mtu.map_or(fits, |limit| limit.min(fits))
}

/// Largest inner packet in bytes that fits into an overlay packet on this node's uplink.
fn overlay_mtu(member: &Member, me: &Me) -> u32 {
    let overhead = if member.address.is_ipv6() { OVERLAY_OVERHEAD6 } else { OVERLAY_OVERHEAD };
    me.uplink_mtu.saturating_sub(overhead as u32).max(MIN_MTU)
}

/// The prefixes of this node, without its own addresses: where node addresses are forwarded, other devices have those.
fn pod_prefixes(member: &Member) -> Vec<IpNet> {
    let own: BTreeSet<IpNet> = member.addresses.iter().copied().map(IpNet::from).collect();
    member.prefixes.difference(&own).copied().collect()
}

/// What must stay outside the tunnel on this node: what `me` protects, the pool's own nodes, and every endpoint that
/// nodes dial.
fn protected<'a>(topology: &Topology, pool: &Pool, me: &'a Me, own: &'a [IpNet]) -> Protected<'a> {
    // Not the addresses of names: a forged answer of DNS would take a prefix out of the tunnel.
    let fixed = |gateway: &GatewayPeer| match gateway.dial {
        Some(Dial::Address(address)) => Some(IpNet::from(address.ip())),
        _ => None,
    };
    let endpoints = topology.pools.values().flat_map(|p| p.gateways.values()).filter_map(fixed);
    let proxies = topology.pools.values().flat_map(|p| p.proxies.values()).filter_map(|p| p.dial.as_ref());
    let proxies = proxies.filter_map(|(host, _)| host.parse().ok()).map(|ip: IpAddr| IpNet::from(ip));
    // Further addresses only on this LAN: a node may report any number of them.
    let on_lan = |address: &IpAddr| me.subnets.iter().any(|subnet| subnet.contains(address));
    let addresses =
        |m: &Member| -> Vec<IpAddr> { m.addresses.iter().filter(|a| **a == m.address || on_lan(a)).copied().collect() };
    let nodes = pool.members.values().flat_map(addresses).map(IpNet::from);
    let api_servers = topology.api_servers.iter().copied().map(IpNet::from);
    let prefixes =
        me.protected.iter().copied().chain(api_servers).chain(endpoints).chain(proxies).chain(nodes).collect();
    Protected { prefixes, subnets: &me.subnets, own }
}

/// Names of another pool's gateway nodes whose addresses are not known.
fn unresolved<'a>(gateway: &'a str, pool: &'a Pool) -> impl Iterator<Item = String> + 'a {
    pool.gateways.iter().filter_map(move |(node, peer)| match &peer.dial {
        Some(Dial::Name { host, address: None, .. }) => Some(format!(
            "Gateway {gateway}: node {node} is dialled by the name {host:?}, which has no usable address: check that this \
             node's resolver (/etc/resolv.conf) knows it, and that no pod prefix contains its address"
        )),
        _ => None,
    })
}

fn without_pool(topology: &Topology, me: &Me) -> Vec<String> {
    let mut problems = topology.problems.clone();
    problems.push(format!(
        "node {} belongs to no Gateway; label it with {}=<gateway>, or change a Gateway's nodeSelector so that it matches the node",
        me.node,
        raven_api::LABEL_GATEWAY
    ));
    problems
}

/// The plan of a node on which nothing is set up.
fn empty(me: &Me, proxy: Arc<ProxyPlan>, problems: Vec<String>) -> Plan {
    Plan {
        role: Role::None,
        pool: None,
        overlay: None,
        tunnel: None,
        state: State::default(),
        config: Config {
            node: Ipv4Addr::UNSPECIFIED,
            address: Ipv4Addr::UNSPECIFIED.into(),
            tunnel_mtu: tunnel_mtu(me),
            relay: false,
            encrypted: false,
            tunnel_port: 0,
        },
        gateway_names: BTreeMap::new(),
        peer_names: BTreeMap::new(),
        interception: None,
        proxy,
        problems,
    }
}

#[cfg(test)]
mod tests;
