//! `plan(topology, me)`: what this node should have in its kernel. Pure: the same input gives the same output, byte for
//! byte; no clock, no I/O.
//!
//! In order: [`path`] decides how each other pool is reached and which gateway node owns which prefix; [`routes`],
//! [`peers`] and [`maps`] turn that into what the drivers put into the kernel.

mod maps;
mod path;
mod peers;
mod routes;

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, Ipv4Addr},
};

use ipnet::IpNet;
use raven_common::{OVERLAY_OVERHEAD, TUNNEL_OVERHEAD, tables};

use crate::{
    diff::State,
    proxy::{self, plan::DetourTo},
    topology::{Pool, PresharedKey, Topology},
};

pub use self::path::gateway_ids;
pub(crate) use self::path::weight;

/// What a plan depends on besides the topology: this node, as it is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Me {
    /// Kubernetes name.
    pub node: String,
    /// MTU of the uplink, bytes.
    pub uplink_mtu: u32,
    /// Never into the tunnel, whatever a Gateway says: the API server, the node's own subnets, the Service range.
    pub protected: BTreeSet<IpNet>,
    /// Addresses on the node's devices.
    pub addresses: BTreeSet<IpAddr>,
    /// The gateway node to which connections by address go now.
    pub detour: Option<Ipv4Addr>,
    /// Of all tunnels, where the cluster has one.
    pub preshared: Option<PresharedKey>,
}

/// What this node is to its pool.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// In no pool: nothing is set up.
    None,
    /// Sends other pools' packets to a gateway node.
    Ordinary,
    /// Carries the pool's traffic.
    Gateway,
}

/// Everything that should be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Plan {
    /// What this node is.
    pub role: Role,
    /// The Gateway that it belongs to.
    pub pool: Option<String>,
    /// `raven0`; `None`: it should not be there.
    pub overlay: Option<Overlay>,
    /// `raven-wg0`; `None`: it should not be there.
    pub tunnel: Option<Tunnel>,
    /// Routes, peers and map entries.
    pub state: State,
    /// What the programs know of this node, but for the devices' indexes, which the drivers find.
    pub config: Config,
    /// Names of gateway ids, for counters.
    pub gateway_names: BTreeMap<u32, String>,
    /// Who a peer is, for status and logs.
    pub peer_names: BTreeMap<crate::topology::PublicKey, PeerName>,
    /// Connections that the L7 half takes by address.
    pub detour: Option<Detour>,
    /// What could not be done, one sentence each.
    pub problems: Vec<String>,
}

/// Connections to kubelet ports of edge nodes, by address: see [`proxy::plan::Detour`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Detour {
    /// To this node's proxy; else to the gateway node, by the overlay.
    pub here: bool,
    /// Names of the nodes, by address.
    pub nodes: BTreeMap<Ipv4Addr, String>,
    /// TCP ports.
    pub ports: BTreeSet<u16>,
    /// Source of host processes' packets.
    pub source: Ipv4Addr,
}

/// A peer's names.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PeerName {
    /// Node.
    pub node: String,
    /// Gateway.
    pub gateway: String,
}

/// The overlay device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Overlay {
    /// Bytes.
    pub mtu: u32,
    /// One address per own prefix: source of what is masqueraded on its way out, and of host processes' packets.
    pub addresses: BTreeSet<IpNet>,
}

/// The tunnel device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tunnel {
    /// Bytes.
    pub mtu: u32,
    /// UDP port.
    pub port: u16,
}

/// The part of [`tables::Config`] that is planned.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Config {
    /// Outer address.
    pub node: Ipv4Addr,
    /// Largest inner packet, bytes.
    pub tunnel_mtu: u32,
    /// Relay between other pools.
    pub relay: bool,
    /// UDP port of the tunnel; 0 on an ordinary node.
    pub tunnel_port: u16,
}

/// Largest packet that fits into the tunnel of a node with this uplink, bytes.
fn tunnel_mtu(uplink_mtu: u32) -> u32 {
    // 1280: IPv6 allows no less (RFC 8200 §5).
    uplink_mtu.saturating_sub(TUNNEL_OVERHEAD as u32).max(1280)
}

/// See the module's text.
pub fn plan(topology: &Topology, me: &Me) -> Plan {
    let detour = proxy::plan::plan(topology, &me.node, me.detour).detour;
    let l3 = topology.settings.l3;
    let Some((name, pool)) = topology.pool_of(&me.node) else { return nothing(me, stranger(topology, me)) };
    if !l3 && detour.is_none() {
        return nothing(me, Vec::new());
    }
    let member = &pool.members[&me.node];
    let own_gateway = pool.gateways.get(&me.node).filter(|_| l3);
    let role = if own_gateway.is_some() { Role::Gateway } else { Role::Ordinary };
    let mut problems = topology.problems.clone();
    // Either half works by itself: without L3 no other pool is reached, and the overlay of the cloud's pool carries the L7 half's
    // connections by address to its gateway nodes.
    let paths = match l3 {
        true => path::paths(topology, name, pool, &guard(topology, pool, me), &mut problems),
        false => BTreeMap::new(),
    };
    if pool.usable().next().is_none() && role == Role::Ordinary && !paths.is_empty() {
        problems.push(format!("Gateway {name} has no gateway node that has published a key: traffic to other pools is dropped here"));
    }
    // The node's own address, where node addresses are forwarded, is on its uplink already.
    let own = IpNet::from(IpAddr::V4(member.outer));
    let prefixes = || member.prefixes.iter().filter(|p| **p != own);
    let sources: Vec<IpAddr> = prefixes().map(|prefix| routes::source(prefix, &me.addresses)).collect();
    let mtu = tunnel_mtu(me.uplink_mtu);
    let own_v4 = sources.iter().find_map(|s| if let IpAddr::V4(s) = s { Some(*s) } else { None });
    let by_address = detour.as_ref().map(|d| match d.to {
        DetourTo::Here => taken(d, me, member.outer),
        DetourTo::Gateway(_) => taken(d, me, own_v4.unwrap_or(member.outer)),
    });
    let mut state = State {
        routes: routes::routes(&paths, role, &sources, mtu),
        peers: if role == Role::Gateway { peers::peers(&paths, pool, me.preshared) } else { BTreeMap::new() },
        remote: maps::remote(&paths, role, &me.node, pool),
        local: maps::local(pool),
        nodes: maps::nodes(pool),
    };
    for (prefix, remote) in detour.iter().zip(&by_address).flat_map(|(d, taken)| maps::detoured(topology, d, taken)) {
        // Where L3 carries node addresses it carries these connections, too.
        state.remote.entry(prefix).or_insert(remote);
    }
    Plan {
        role,
        pool: Some(name.to_owned()),
        overlay: Some(Overlay {
            mtu: me.uplink_mtu.saturating_sub(OVERLAY_OVERHEAD as u32).max(1280),
            addresses: prefixes().map(routes::own_address).collect(),
        }),
        tunnel: own_gateway.map(|gateway| Tunnel { mtu, port: gateway.port }),
        state,
        config: Config { node: member.outer, tunnel_mtu: mtu, relay: pool.exposed, tunnel_port: own_gateway.map_or(0, |g| g.port) },
        gateway_names: gateway_ids(topology).into_iter().map(|(name, id)| (id, name)).collect(),
        peer_names: peers::names(topology),
        detour: by_address,
        problems,
    }
}

/// What is taken by address on this node, less what it needs itself.
fn taken(detour: &proxy::plan::Detour, me: &Me, source: Ipv4Addr) -> Detour {
    let free = |address: &Ipv4Addr| {
        !me.protected.iter().any(|p| p.contains(&IpAddr::V4(*address))) && !me.addresses.contains(&IpAddr::V4(*address))
    };
    let nodes = detour.nodes.iter().filter(|(address, _)| free(address));
    let names = |nodes: &[(String, String)]| nodes.iter().map(|(node, _)| node.as_str()).collect::<Vec<_>>().join(" or ");
    Detour {
        here: detour.to == DetourTo::Here,
        nodes: nodes.map(|(address, nodes)| (*address, names(nodes))).collect(),
        ports: detour.ports.clone(),
        source,
    }
}

/// Prefixes that no Gateway may claim on this node: what `me` knows, the pool's own nodes, and every tunnel endpoint.
fn guard(topology: &Topology, pool: &Pool, me: &Me) -> BTreeSet<IpNet> {
    let endpoints = topology.pools.values().flat_map(|p| p.gateways.values()).filter_map(|g| g.dial).map(|d| IpNet::from(d.ip()));
    let proxies = topology.pools.values().flat_map(|p| p.proxies.values()).filter_map(|p| p.dial.as_ref());
    let proxies = proxies.filter_map(|(host, _)| host.parse().ok()).map(|ip: IpAddr| IpNet::from(ip));
    let nodes = pool.members.values().map(|m| IpNet::from(IpAddr::V4(m.outer)));
    let api_servers = topology.api_servers.iter().copied().map(IpNet::from);
    me.protected.iter().copied().chain(api_servers).chain(endpoints).chain(proxies).chain(nodes).collect()
}

fn stranger(topology: &Topology, me: &Me) -> Vec<String> {
    let mut problems = topology.problems.clone();
    problems.push(format!(
        "node {} belongs to no Gateway; label it with {}=<gateway>, or let the Gateway's nodeSelector match it",
        me.node,
        raven_api::LABEL_GATEWAY
    ));
    problems
}

fn nothing(me: &Me, problems: Vec<String>) -> Plan {
    Plan {
        role: Role::None,
        pool: None,
        overlay: None,
        tunnel: None,
        state: State::default(),
        config: Config { node: Ipv4Addr::UNSPECIFIED, tunnel_mtu: tunnel_mtu(me.uplink_mtu), relay: false, tunnel_port: 0 },
        gateway_names: BTreeMap::new(),
        peer_names: BTreeMap::new(),
        detour: None,
        problems,
    }
}

impl Config {
    /// As the map has it.
    ///
    /// `redirect`: this kernel takes a redirect from `raven0` into the tunnel. `xdp`: our XDP program is on the uplink.
    /// `generation`: what the table has; [`crate::bpf::Bpf`] moves it on when another table changes.
    pub fn to_table(self, indexes: Indexes, redirect: bool, xdp: bool, generation: u32) -> tables::Config {
        let flag = |set: bool, flag: u32| if set { flag } else { 0 };
        let flags =
            flag(redirect, tables::CONFIG_TUNNEL_REDIRECT) | flag(self.relay, tables::CONFIG_RELAY) | flag(!xdp, tables::CONFIG_TC_GUARD);
        tables::Config {
            node: self.node.octets(),
            uplink_ifindex: indexes.uplink,
            overlay_ifindex: indexes.overlay,
            tunnel_ifindex: indexes.tunnel.unwrap_or(0),
            tunnel_mtu: self.tunnel_mtu,
            flags,
            tunnel_port: self.tunnel_port.into(),
            generation,
        }
    }
}

/// Interface indexes, as the drivers found them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Indexes {
    /// The device that faces the pool's LAN.
    pub uplink: u32,
    /// `raven0`.
    pub overlay: u32,
    /// `raven-wg0`, on a gateway node.
    pub tunnel: Option<u32>,
}

#[cfg(test)]
mod tests;
