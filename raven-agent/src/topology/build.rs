//! Builds the [`Topology`] from API objects. Invalid input is left out and named in `problems`; it never
//! affects the rest.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
};

use ipnet::IpNet;
use prefix_trie::joint::JointPrefixMap;
use raven_api::{
    DEFAULT_TUNNEL_PORT, Gateway, GatewayNode,
    gateway::{CONFIG_PUBLIC_KEY, Endpoint, EndpointType, NodeInfo},
    names::{SWITCH_L3, SWITCH_L7},
    prefix::is_routable,
    proxy::{CONFIG_HOSTNAME, CONFIG_NODE_UID, CONFIG_PROXY_READY, Ports, canonical_host},
};
use serde::{Deserialize, Serialize};

use super::{Dial, GatewayPeer, Member, Pool, ProxyPeer, PublicKey, Topology, settings::ClusterSettings};

/// The API objects that the agent watches. This is also the format of the snapshot on disk.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Inputs {
    /// Gateways, in any order.
    #[serde(default)]
    pub gateways: Vec<Gateway>,
    /// GatewayNodes in the snapshot of an older release, for their keys; see [`keep_keys`].
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub gateway_nodes: Vec<GatewayNode>,
    /// Cluster-wide settings.
    #[serde(default)]
    pub settings: ClusterSettings,
    /// Certificates (PEM) of the CA that signs the proxies' certificates.
    #[serde(default)]
    pub proxy_ca: String,
    /// Addresses of the API servers, which must never enter the tunnel.
    #[serde(default)]
    pub api_servers: BTreeSet<IpAddr>,
    /// Addresses of the [`host_names`], as far as this node has resolved them.
    #[serde(default)]
    pub resolved: BTreeMap<String, IpAddr>,
}

/// Names by which the gateway node `me` dials other pools' gateway nodes, with those nodes. Empty on other nodes.
pub fn host_names(inputs: &Inputs, me: &str) -> BTreeMap<String, BTreeSet<String>> {
    let is_mine = |gateway: &Gateway| tunnels(gateway).any(|endpoint| endpoint.node_name == me);
    if !inputs.gateways.iter().any(is_mine) {
        return BTreeMap::new();
    }
    let others = inputs.gateways.iter().filter(|gateway| gateway.is_exposed() && !is_mine(gateway));
    let mut names: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
    for endpoint in others.flat_map(tunnels) {
        if let Some(name) = host_name(endpoint) {
            names.entry(name.to_owned()).or_default().insert(endpoint.node_name.clone());
        }
    }
    names
}

/// The elected endpoints of a Gateway's tunnel.
fn tunnels(gateway: &Gateway) -> impl Iterator<Item = &Endpoint> {
    let active = gateway.status.iter().flat_map(|status| &status.active_endpoints);
    active.filter(|endpoint| endpoint.type_ == EndpointType::Tunnel)
}

/// The key of a node in a pool with encryption. The controller publishes an empty one if the node has none.
fn member_key(node: &NodeInfo) -> Option<&str> {
    node.public_key.as_deref().filter(|key| !key.is_empty())
}

/// The name of an endpoint without a public address.
fn host_name(endpoint: &Endpoint) -> Option<&str> {
    let name = endpoint.config.get(CONFIG_HOSTNAME).filter(|name| !name.is_empty())?;
    endpoint.public_ip.as_deref().is_none_or(str::is_empty).then_some(name)
}

/// The topology of these objects, in any order.
pub fn build(inputs: &Inputs) -> Topology {
    let mut gateways: Vec<&Gateway> = inputs.gateways.iter().collect();
    // The older Gateway wins a conflict, as in the controller. An object without a creation time counts as new.
    gateways.sort_by_key(|g| {
        let created = g.metadata.creation_timestamp.as_ref().map(|t| t.0);
        (created.is_none(), created, g.metadata.name.clone())
    });
    let keys = earlier_keys(&inputs.gateway_nodes);
    let topology = Topology {
        api_servers: inputs.api_servers.clone(),
        settings: inputs.settings.clone(),
        ports: Ports::of(&inputs.gateways),
        proxy_ca: inputs.proxy_ca.clone(),
        ..Topology::default()
    };
    let resolved = inputs.resolved.clone();
    let mut builder = Builder { topology, keys, resolved, ..Builder::default() };
    // A key that two nodes claim stays with the first. Exposed Gateways come first: a stolen node of an older site that
    // publishes the cloud's key must not disconnect the cloud.
    let mut exposed_first = gateways.clone();
    exposed_first.sort_by_key(|gateway| !gateway.is_exposed());
    exposed_first.iter().for_each(|gateway| builder.keep_keys(gateway));
    gateways.iter().for_each(|gateway| builder.add(gateway));
    if inputs.settings.forward_node_ip {
        // After the prefixes of all Gateways: the kubelet reports the node's address, so a stolen node could take
        // another pool's prefix off the network with an address inside it.
        builder.add_node_addresses(&exposed_first);
    }
    builder.drop_names_inside_pools();
    builder.topology
}

/// Keeps the keys of nodes for which the controller publishes none: one of an older release leads, during an
/// upgrade or after a rollback. Tunnels must not end because of it.
pub fn keep_keys(inputs: &mut Inputs, before: &Inputs) {
    let mut known = earlier_keys(&before.gateway_nodes);
    for endpoint in before.gateways.iter().flat_map(tunnels) {
        let key = endpoint.config.get(CONFIG_PUBLIC_KEY);
        key.map(|key| known.insert(endpoint.node_name.clone(), key.clone()));
    }
    let nodes = before.gateways.iter().filter_map(|gateway| gateway.status.as_ref()).flat_map(|status| &status.nodes);
    known.extend(nodes.filter_map(|node| Some((node.node_name.clone(), node.public_key.clone()?))));
    for gateway in &mut inputs.gateways {
        let encrypted = gateway.encrypts_pool();
        let Some(status) = gateway.status.as_mut() else { continue };
        for node in status.nodes.iter_mut().filter(|node| encrypted && node.public_key.is_none()) {
            node.public_key = known.get(&node.node_name).cloned();
        }
        for endpoint in status.active_endpoints.iter_mut().filter(|e| e.type_ == EndpointType::Tunnel) {
            if let (false, Some(key)) =
                (endpoint.config.contains_key(CONFIG_PUBLIC_KEY), known.get(&endpoint.node_name))
            {
                endpoint.config.insert(CONFIG_PUBLIC_KEY.to_owned(), key.clone());
            }
        }
    }
}

fn earlier_keys(nodes: &[GatewayNode]) -> BTreeMap<String, String> {
    nodes.iter().filter_map(|n| Some((n.metadata.name.clone()?, n.spec.public_key.clone()?))).collect()
}

#[derive(Default)]
struct Builder {
    topology: Topology,
    keys: BTreeMap<String, String>,
    taken: JointPrefixMap<IpNet, String>,
    nodes: BTreeMap<String, String>,
    key_owners: BTreeMap<PublicKey, String>,
    resolved: BTreeMap<String, IpAddr>,
}

impl Builder {
    fn problem(&mut self, text: String) {
        self.topology.problems.push(text);
    }

    fn add(&mut self, gateway: &Gateway) {
        let Some(name) = gateway.metadata.name.clone() else { return };
        let status = gateway.status.clone().unwrap_or_default();
        let mut pool = Pool {
            exposed: gateway.is_exposed(),
            l3: gateway.tunnel_replicas() > 0,
            encrypted: gateway.encrypts_pool(),
            l7: gateway.proxy_replicas() > 0,
            ..Pool::default()
        };
        let mut stand_ins = StandIns::of(&status.nodes);
        let candidates = gateway.spec.endpoints.iter().filter(|endpoint| endpoint.type_ == EndpointType::Tunnel);
        let listed = candidates.chain(tunnels(gateway)).map(|e| (e.node_name.as_str(), e.port_or_default()));
        let ports: BTreeMap<&str, u16> = listed.collect();
        for node in &status.nodes {
            if let Some(mut member) = self.member(&name, node, stand_ins.as_mut()) {
                member.tunnel_port = ports.get(node.node_name.as_str()).copied().unwrap_or(DEFAULT_TUNNEL_PORT);
                pool.members.insert(node.node_name.clone(), member);
            }
        }
        for endpoint in tunnels(gateway) {
            if endpoint.config.get(SWITCH_L3).is_some_and(|v| v == "false") {
                continue;
            }
            match pool.members.get(&endpoint.node_name).map(|m| m.address) {
                Some(address) => {
                    let peer = self.peer(&name, endpoint, address, pool.exposed);
                    pool.gateways.insert(endpoint.node_name.clone(), peer);
                }
                None => self.problem(format!(
                    "Gateway {name}: elected node {} is not a node of this Gateway",
                    endpoint.node_name
                )),
            }
        }
        pool.proxies = proxies(&pool, &status.active_endpoints);
        self.topology.pools.insert(name, pool);
    }

    /// `stand_ins`: of a pool whose nodes exchange overlay packets over IPv6.
    fn member(&mut self, gateway: &str, node: &NodeInfo, stand_ins: Option<&mut StandIns>) -> Option<Member> {
        if let Some(other) = self.nodes.get(&node.node_name) {
            let text = format!("Gateway {gateway}: node {} belongs to Gateway {other} already", node.node_name);
            self.problem(text);
            return None;
        }
        let (address, outer) = match (node.private_ip.parse::<IpAddr>(), stand_ins) {
            (Ok(IpAddr::V4(address)), None) => (address.into(), address),
            (Ok(IpAddr::V6(address)), Some(stand_ins)) => (address.into(), stand_ins.assign(address)),
            (address, _) => {
                let ip = &node.private_ip;
                let why = match address {
                    Ok(_) => {
                        format!("its InternalIP {ip} is IPv6 and the pool uses IPv4; set --node-ip of its kubelet")
                    }
                    Err(_) => format!("its InternalIP {ip:?} is not an IP address; check its kubelet's --node-ip"),
                };
                self.problem(format!("Gateway {gateway}: node {} is left out: {why}", node.node_name));
                return None;
            }
        };
        self.nodes.insert(node.node_name.clone(), gateway.to_owned());
        let prefixes = node.subnets.iter().filter_map(|text| self.prefix(gateway, &node.node_name, text)).collect();
        // The controller writes them, and omits those that are not addresses.
        let further = node.private_ips.iter().filter_map(|text| text.parse().ok());
        let key = member_key(node).and_then(|text| self.key(gateway, &node.node_name, text));
        let addresses = further.chain([address]).collect();
        Some(Member { address, addresses, prefixes, key, ..Member::new(outer) })
    }

    /// Makes each node's own addresses prefixes of it.
    fn add_node_addresses(&mut self, gateways: &[&Gateway]) {
        for gateway in gateways.iter().filter_map(|gateway| gateway.metadata.name.as_deref()) {
            let Some(mut pool) = self.topology.pools.remove(gateway) else { continue };
            for (node, member) in &mut pool.members {
                let addresses = member.addresses.iter().map(IpAddr::to_string);
                member.prefixes.extend(addresses.filter_map(|address| self.prefix(gateway, node, &address)));
            }
            self.topology.pools.insert(gateway.to_owned(), pool);
        }
    }

    fn prefix(&mut self, gateway: &str, node: &str, text: &str) -> Option<IpNet> {
        let address = text.parse::<IpAddr>().map(IpNet::from);
        let Ok(prefix) = text.parse::<IpNet>().or(address) else {
            self.problem(format!(
                "Gateway {gateway}: node {node}: {text:?} is not a prefix in CIDR notation; it is left out"
            ));
            return None;
        };
        let prefix = prefix.trunc();
        if !is_routable(&prefix) {
            self.problem(format!(
                "Gateway {gateway}: node {node}: {prefix} is not routable and cannot be a pod prefix; it is left out"
            ));
            return None;
        }
        if let Some((other, owner)) = overlapping(&self.taken, &prefix, gateway) {
            self.problem(format!(
                "Gateway {gateway}: node {node}: {prefix} overlaps {other} of Gateway {owner}; it is left out"
            ));
            return None;
        }
        self.taken.insert(prefix, gateway.to_owned());
        Some(prefix)
    }

    fn keep_keys(&mut self, gateway: &Gateway) {
        let elected = tunnels(gateway).filter_map(|e| Some((&e.node_name, self.claimed_key(e)?)));
        let nodes = gateway.status.iter().flat_map(|status| &status.nodes);
        let members = nodes.filter_map(|node| Some((&node.node_name, member_key(node)?.to_owned())));
        for (node, text) in elected.chain(members).collect::<Vec<_>>() {
            if let Ok(key) = text.parse::<PublicKey>() {
                self.key_owners.entry(key).or_insert_with(|| node.clone());
            }
        }
    }

    /// The controller publishes an empty key if that of the node belongs to another one.
    fn claimed_key(&self, endpoint: &Endpoint) -> Option<String> {
        let key = endpoint.config.get(CONFIG_PUBLIC_KEY).or_else(|| self.keys.get(&endpoint.node_name));
        key.filter(|key| !key.is_empty()).cloned()
    }

    fn peer(&mut self, gateway: &str, endpoint: &Endpoint, address: IpAddr, exposed: bool) -> GatewayPeer {
        let key = self.claimed_key(endpoint).and_then(|text| self.key(gateway, &endpoint.node_name, &text));
        let public = endpoint.public_address();
        let port = endpoint.dialled_port();
        let at = |ip| Some(Dial::Address(SocketAddr::new(ip, port)));
        let dial = match (public, host_name(endpoint)) {
            (Some(public), _) if exposed || !endpoint.under_nat => at(public),
            (None, Some(host)) if exposed => {
                Some(Dial::Name { host: host.to_owned(), port, address: self.resolved.get(host).copied() })
            }
            // In an installation on one LAN, the node's own address is the one that other pools dial.
            (None, None) if exposed => at(address),
            _ => None,
        };
        GatewayPeer { key, dial }
    }

    /// An endpoint inside a pool's prefix would be sent into the tunnel that it carries, or is a forged answer of DNS.
    fn drop_names_inside_pools(&mut self) {
        for gateway in self.topology.pools.values_mut().flat_map(|pool| pool.gateways.values_mut()) {
            if let Some(Dial::Name { address, .. }) = &mut gateway.dial {
                *address = address.filter(|ip| self.taken.cover(&IpNet::from(*ip)).next().is_none());
            }
        }
    }

    /// The key that the controller has published for the node. A key that two nodes claim stays with the first:
    /// otherwise one node would receive the packets of the other.
    fn key(&mut self, gateway: &str, node: &String, text: &str) -> Option<PublicKey> {
        let Ok(key) = text.parse::<PublicKey>() else {
            self.problem(format!(
                "Gateway {gateway}: node {node}: {text:?} is not a WireGuard public key (base64 of 32 bytes)"
            ));
            return None;
        };
        match self.key_owners.get(&key).filter(|owner| *owner != node).cloned() {
            Some(owner) => {
                self.problem(format!("Gateway {gateway}: node {node} claims the WireGuard key of node {owner}"));
                None
            }
            None => {
                self.key_owners.insert(key, node.clone());
                Some(key)
            }
        }
    }
}

/// Stand-ins for the IPv6 addresses of a pool's nodes, in maps whose keys are IPv4 addresses. They are local: each node assigns
/// its own.
struct StandIns(BTreeSet<Ipv4Addr>);

impl StandIns {
    /// The range of stand-ins, which has no hosts (RFC 1112 §4).
    const RANGE: u32 = 0xf000_0000;

    /// `None` if a node has an IPv4 address. The controller writes addresses of one family.
    fn of(nodes: &[NodeInfo]) -> Option<Self> {
        let any_ipv4 = nodes.iter().any(|node| node.private_ip.parse::<Ipv4Addr>().is_ok());
        (!any_ipv4).then(|| Self(BTreeSet::new()))
    }

    /// Returns the sum of the address's 32-bit words, with the top four bits set, or the next free number.
    fn assign(&mut self, address: Ipv6Addr) -> Ipv4Addr {
        let words = address
            .octets()
            .chunks_exact(4)
            .map(|word| u32::from_be_bytes([word[0], word[1], word[2], word[3]]))
            .fold(0, u32::wrapping_add);
        let mut number = words;
        loop {
            let stand_in = Ipv4Addr::from(number | Self::RANGE);
            if self.0.insert(stand_in) {
                return stand_in;
            }
            number = number.wrapping_add(1);
        }
    }
}

/// Elected proxy nodes of a pool. An elected node outside the pool is ignored here; it is reported for the tunnel.
fn proxies(pool: &Pool, active: &[Endpoint]) -> BTreeMap<String, ProxyPeer> {
    let elected = active.iter().filter(|e| e.type_ == EndpointType::Proxy);
    let on = elected.filter(|e| e.config.get(SWITCH_L7).is_none_or(|v| v != "false"));
    on.filter_map(|endpoint| {
        let address = pool.members.get(&endpoint.node_name)?.address;
        let text = |value: Option<&String>| value.filter(|v| !v.is_empty()).cloned();
        let host = text(endpoint.public_ip.as_ref())
            .map(|ip| canonical_host(&ip))
            .or_else(|| host_name(endpoint).map(str::to_owned));
        // In an installation on one LAN, the node's own address is the one that edges dial.
        let host = pool.exposed.then(|| host.unwrap_or_else(|| address.to_string()));
        let dial = host.map(|host| (host, endpoint.dialled_port()));
        let ready = endpoint.config.get(CONFIG_PROXY_READY).is_some_and(|text| text == "true");
        Some((
            endpoint.node_name.clone(),
            ProxyPeer {
                dial,
                port: endpoint.port_or_default(),
                ready,
                uid: text(endpoint.config.get(CONFIG_NODE_UID)),
            },
        ))
    })
    .collect()
}

/// A prefix of `taken` that conflicts with `prefix` of `gateway`: the same prefix, or one of another Gateway that
/// contains it or is inside it. Nested prefixes of one Gateway do not conflict, because the longest match selects
/// between them.
fn overlapping<'a>(
    taken: &'a JointPrefixMap<IpNet, String>,
    prefix: &'a IpNet,
    gateway: &str,
) -> Option<(IpNet, &'a String)> {
    let conflicts = |(other, owner): &(IpNet, &String)| other == prefix || *owner != gateway;
    // The longest prefix that contains this one, else one inside it.
    taken.cover(prefix).filter(conflicts).last().or_else(|| taken.children(prefix).find(conflicts))
}

#[cfg(test)]
mod tests {
    use raven_api::gateway::Encryption;

    use super::*;

    fn taken(list: &[&str]) -> JointPrefixMap<IpNet, String> {
        list.iter().map(|p| (p.parse().expect("a prefix"), "other".to_owned())).collect()
    }

    #[test]
    fn overlap_is_found_in_both_directions() {
        let t = taken(&["10.0.0.0/24", "10.0.2.0/24", "fd00::/64"]);
        let overlaps = |p: &str| overlapping(&t, &p.parse().expect("a prefix"), "ours").is_some();
        assert!(overlaps("10.0.0.0/24"));
        assert!(overlaps("10.0.0.128/25"));
        assert!(overlaps("10.0.0.0/16"));
        assert!(overlaps("10.0.0.0/22"), "contains 10.0.2.0/24");
        assert!(!overlaps("10.0.1.0/24"));
        assert!(!overlaps("10.0.3.0/24"));
        assert!(overlaps("fd00::/48"));
        assert!(!overlaps("fd01::/48"));
    }

    #[test]
    fn nodes_of_a_pool_with_ipv6_only_get_stand_ins() {
        let built = |addresses: &[&str]| {
            let node = |(n, address): (usize, &&str)| NodeInfo {
                node_name: format!("n{n}"),
                private_ip: (*address).to_owned(),
                ..NodeInfo::default()
            };
            let mut gateway = Gateway::new("edge", Default::default());
            let nodes = addresses.iter().enumerate().map(node).collect();
            gateway.status = Some(raven_api::gateway::GatewayStatus { nodes, ..Default::default() });
            build(&Inputs { gateways: vec![gateway], ..Inputs::default() })
        };
        // The first two have the same stand-in by their address alone.
        let topology = built(&["fd10:1::11", "fd10:0:1::11:0:0", "fd10:1::12"]);
        let members = &topology.pools["edge"].members;
        let outer: Vec<Ipv4Addr> = members.values().map(|m| m.outer).collect();
        assert_eq!(outer.iter().collect::<BTreeSet<_>>().len(), 3, "{outer:?}");
        assert!(outer.iter().all(|outer| outer.octets()[0] >= 240), "{outer:?}");
        assert_eq!(members["n0"].address, "fd10:1::11".parse::<IpAddr>().expect("an address"));
        assert_eq!(topology.problems, Vec::<String>::new());

        let topology = built(&["fd10:1::11", "10.1.0.12"]);
        let members = &topology.pools["edge"].members;
        assert_eq!(members.keys().collect::<Vec<_>>(), ["n1"]);
        assert_eq!((members["n1"].outer, members["n1"].address), ([10, 1, 0, 12].into(), [10, 1, 0, 12].into()));
        assert!(
            topology.problems[0].contains("n0") && topology.problems[0].contains("IPv4"),
            "{:?}",
            topology.problems
        );
    }

    #[test]
    fn gateway_node_with_a_name_is_dialled_where_the_name_leads() {
        let mut gateway = Gateway::new("cloud", Default::default());
        gateway.spec.expose_type = raven_api::gateway::ExposeType::LoadBalancer;
        let endpoint = Endpoint {
            node_name: "c1".to_owned(),
            type_: EndpointType::Tunnel,
            config: BTreeMap::from([(CONFIG_HOSTNAME.to_owned(), "lb.example".to_owned())]),
            ..Endpoint::default()
        };
        let node = NodeInfo { node_name: "c1".into(), private_ip: "10.0.0.1".into(), ..NodeInfo::default() };
        gateway.status = Some(raven_api::gateway::GatewayStatus {
            nodes: vec![node],
            active_endpoints: vec![endpoint],
            ..Default::default()
        });
        let mut inputs = Inputs { gateways: vec![gateway], ..Inputs::default() };
        let dial = |inputs: &Inputs| build(inputs).pools["cloud"].gateways["c1"].dial.clone().expect("it is dialled");
        assert_eq!(dial(&inputs).address(), None, "not the InternalIP, which edges cannot reach");
        let address = IpAddr::from([203, 0, 113, 9]);
        inputs.resolved.insert("lb.example".to_owned(), address);
        assert_eq!(dial(&inputs).address(), Some((address, 4500).into()));
        if let Some(status) = &mut inputs.gateways[0].status {
            status.nodes[0].subnets = vec!["203.0.113.0/24".to_owned()];
        }
        assert_eq!(dial(&inputs).address(), None, "inside a pod prefix");

        assert_eq!(host_names(&inputs, "c1"), BTreeMap::new(), "not of the own pool");
        let mut edge = Gateway::new("edge", Default::default());
        let endpoint = Endpoint { node_name: "e1".to_owned(), type_: EndpointType::Tunnel, ..Endpoint::default() };
        edge.status =
            Some(raven_api::gateway::GatewayStatus { active_endpoints: vec![endpoint], ..Default::default() });
        inputs.gateways.push(edge);
        let dialled = BTreeMap::from([("lb.example".to_owned(), BTreeSet::from(["c1".to_owned()]))]);
        assert_eq!(host_names(&inputs, "e1"), dialled);
        assert_eq!(host_names(&inputs, "e2"), BTreeMap::new(), "not a gateway node");
    }

    #[test]
    fn keys_outlive_an_upgrade_and_a_rollback_of_the_controller() {
        let gateway = |key: Option<&str>| {
            let mut gateway = Gateway::new("x", Default::default());
            let config = key.map(|key| (CONFIG_PUBLIC_KEY.to_owned(), key.to_owned())).into_iter().collect();
            let endpoint = Endpoint { node_name: "x1".to_owned(), config, ..Endpoint::default() };
            gateway.status =
                Some(raven_api::gateway::GatewayStatus { active_endpoints: vec![endpoint], ..Default::default() });
            Inputs { gateways: vec![gateway], ..Inputs::default() }
        };
        let key =
            |inputs: &Inputs| tunnels(&inputs.gateways[0]).next().and_then(|e| e.config.get("publicKey")).cloned();
        let with = |mut inputs: Inputs, before: &Inputs| {
            keep_keys(&mut inputs, before);
            inputs
        };
        // The snapshot of an older release, and its controller still leads.
        let mut old = gateway(None);
        let spec = raven_api::GatewayNodeSpec { public_key: Some("a".to_owned()), ..Default::default() };
        old.gateway_nodes = vec![GatewayNode::new("x1", spec)];
        let inputs = with(gateway(None), &old);
        assert_eq!(key(&inputs).as_deref(), Some("a"));
        let inputs = with(gateway(Some("b")), &inputs);
        assert_eq!(key(&inputs).as_deref(), Some("b"), "the newer controller publishes keys");
        assert_eq!(key(&with(gateway(None), &inputs)).as_deref(), Some("b"), "the older one leads again");
        // Members' keys are kept, too; an empty key removes one.
        let member = |encryption, key: Option<&str>| {
            let mut gateway = Gateway::new("x", raven_api::GatewaySpec { encryption, ..Default::default() });
            let public_key = key.map(str::to_owned);
            let node = NodeInfo { node_name: "x2".to_owned(), public_key, ..NodeInfo::default() };
            gateway.status = Some(raven_api::gateway::GatewayStatus { nodes: vec![node], ..Default::default() });
            Inputs { gateways: vec![gateway], ..Inputs::default() }
        };
        let own = |inputs: Inputs| inputs.gateways[0].status.clone().expect("a status").nodes[0].public_key.clone();
        let published = member(Encryption::Pool, Some("c"));
        assert_eq!(own(with(member(Encryption::Pool, None), &published)).as_deref(), Some("c"));
        assert_eq!(own(with(member(Encryption::Pool, Some("")), &published)).as_deref(), Some(""));
        assert_eq!(own(with(member(Encryption::Gateways, None), &published)), None);
    }

    #[test]
    fn prefixes_nest_within_one_gateway_only() {
        let mut t = taken(&["10.0.0.0/16", "10.2.0.0/24"]);
        t.insert("10.0.1.0/24".parse().expect("a prefix"), "other".to_owned());
        t.insert("10.0.2.0/24".parse().expect("a prefix"), "other".to_owned());
        let overlaps = |p: &str| overlapping(&t, &p.parse().expect("a prefix"), "other").is_some();
        assert!(!overlaps("10.0.3.0/24"), "inside its own /16");
        assert!(!overlaps("10.0.0.0/12"), "around its own");
        assert!(overlaps("10.0.1.0/24"), "the same prefix of another node");
        t.insert("10.3.0.0/24".parse().expect("a prefix"), "third".to_owned());
        let owner = |prefix: &str, gateway| {
            let prefix = prefix.parse().expect("a prefix");
            overlapping(&t, &prefix, gateway).map(|(_, owner)| owner.clone())
        };
        assert_eq!(owner("10.0.0.0/8", "other").as_deref(), Some("third"), "found behind its own prefixes");
        assert_eq!(owner("10.0.1.128/25", "third").as_deref(), Some("other"));
    }
}
