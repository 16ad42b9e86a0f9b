//! `plan(topology, me)` of the L7 half: what this node is to it, whom it dials, and which node a name or an address means. Pure.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, Ipv4Addr},
};

use raven_api::proxy::Ports;

use crate::{
    plan::weight,
    topology::{Pool, Topology},
};

/// What this node is to the L7 path.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Role {
    /// Nothing.
    #[default]
    None,
    /// In the cloud: takes requests and hands them to edges' tunnels.
    Cloud {
        /// TCP port where edges dial it.
        port: u16,
        /// Names and addresses by which they do: what its certificate is for.
        names: BTreeSet<String>,
    },
    /// At an edge: dials these cloud gateway nodes (host and port, by node name), and serves them.
    Edge(BTreeMap<String, (String, u16)>),
}

/// All that the proxy of this node does follows from this.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Plan {
    /// What this node is.
    pub role: Role,
    /// The UID that its certificate is to have, where it is known.
    pub uid: Option<String>,
    /// Which node is meant.
    pub directory: Directory,
    /// In the cloud: what is reached by address.
    pub detour: Option<Detour>,
}

/// Names and addresses of nodes.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Directory {
    /// The pool of this node.
    pub own_pool: String,
    /// Ports that are reached.
    pub ports: Ports,
    nodes: BTreeMap<String, Target>,
    addresses: BTreeMap<IpAddr, BTreeSet<String>>,
    /// Edge nodes that may bring a tunnel, with their UID where it is known, and the pool for which.
    proxies: BTreeMap<String, (Option<String>, String)>,
}

/// Who brings a tunnel, as its certificate says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Bearer {
    /// The node's name.
    pub node: String,
    /// UID of the Node object that it was.
    pub uid: Option<String>,
}

/// Connections to edge nodes' kubelet ports, by address, that leave the ordinary way.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Detour {
    /// Where to.
    pub to: DetourTo,
    /// The edge nodes by address; an address that several have is here too, so that who dials it is told so.
    pub nodes: BTreeMap<Ipv4Addr, Vec<(String, String)>>,
    /// TCP ports.
    pub ports: BTreeSet<u16>,
}

/// Where connections by address go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DetourTo {
    /// This is the gateway node: to its proxy.
    Here,
    /// To this gateway node of the pool, by the overlay.
    Gateway(Ipv4Addr),
}

/// A node that somebody wants to reach.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Target {
    /// Its name.
    pub node: String,
    /// Its pool.
    pub pool: String,
    /// Its address inside its pool.
    pub address: IpAddr,
}

/// Why nobody is reached.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NotFound {
    /// No such node.
    #[error("no node of this cluster is called {0:?}")]
    Name(String),
    /// No node has the address.
    #[error("no node of this cluster has the address {0}")]
    Address(IpAddr),
    /// Several have it: never guessed.
    #[error("the address {address} belongs to several nodes ({}): reach them by name", nodes.join(", "))]
    Ambiguous {
        /// The address.
        address: IpAddr,
        /// Who has it.
        nodes: Vec<String>,
    },
    /// Not a port that the L7 path reaches.
    #[error("port {0} is not one that Raven reaches on nodes (see proxyHTTPPort and proxyHTTPSPort of the exposed Gateways)")]
    Port(u16),
}

impl Directory {
    /// The node of this name, and whether the port is one of those that are reached.
    pub fn by_name(&self, name: &str, port: u16) -> Result<&Target, NotFound> {
        let target = self.nodes.get(name).ok_or_else(|| NotFound::Name(name.to_owned()))?;
        self.allowed(target, port)
    }

    /// The one node that has this address.
    pub fn by_address(&self, address: IpAddr, port: u16) -> Result<&Target, NotFound> {
        let nodes = self.addresses.get(&address).ok_or(NotFound::Address(address))?;
        match (nodes.len(), nodes.first().and_then(|name| self.nodes.get(name))) {
            (1, Some(target)) => self.allowed(target, port),
            _ => Err(NotFound::Ambiguous { address, nodes: nodes.iter().cloned().collect() }),
        }
    }

    fn allowed<'a>(&self, target: &'a Target, port: u16) -> Result<&'a Target, NotFound> {
        if self.ports.contains(port) { Ok(target) } else { Err(NotFound::Port(port)) }
    }

    /// The address of a node inside its pool.
    pub fn address_of(&self, node: &str) -> Option<IpAddr> {
        self.nodes.get(node).map(|target| target.address)
    }

    /// The pool of a node.
    pub fn pool_of(&self, node: &str) -> Option<&str> {
        self.nodes.get(node).map(|target| target.pool.as_str())
    }

    /// The pool for which this edge node may bring a tunnel: it was elected for it, and it is no earlier node of the same name.
    pub fn pool_of_proxy(&self, bearer: &Bearer) -> Option<&str> {
        let (uid, pool) = self.proxies.get(&bearer.node)?;
        (uid.is_none() || *uid == bearer.uid).then_some(pool.as_str())
    }
}

/// See the module's text.
///
/// `present`: the gateway node to which connections by address go now. It stays as long as it works: those that are open would break.
pub fn plan(topology: &Topology, me: &str, present: Option<Ipv4Addr>) -> Plan {
    let Some((own_pool, pool)) = topology.pool_of(me).filter(|_| topology.settings.l7) else { return Plan::default() };
    let role = match pool.proxies.get(me) {
        Some(own) if pool.exposed => Role::Cloud { port: own.port, names: own.dial.iter().map(|(host, _)| host.clone()).collect() },
        Some(_) => Role::Edge(clouds(topology)),
        None => Role::None,
    };
    let uid = pool.proxies.get(me).and_then(|own| own.uid.clone());
    Plan { role, uid, directory: directory(topology, own_pool), detour: detour(topology, pool, me, present) }
}

/// Addresses of nodes that can be reached directly, and the API server's, are never taken, whatever a node at an edge says its own is.
fn detour(topology: &Topology, own: &Pool, me: &str, present: Option<Ipv4Addr>) -> Option<Detour> {
    if !own.exposed {
        return None;
    }
    let to = match own.proxies.contains_key(me) {
        true => DetourTo::Here,
        false => {
            // Where nobody seems to be ready that may be our own view: as if all were.
            let any_ready = own.proxies.values().any(|proxy| proxy.ready);
            let usable = own.proxies.iter().filter(|(_, proxy)| proxy.ready || !any_ready);
            let usable = usable.filter_map(|(proxy, _)| Some((proxy, own.members.get(proxy)?.outer)));
            let (_, nearest) = usable.max_by_key(|(proxy, address)| (present == Some(*address), weight(&[me, proxy])))?;
            DetourTo::Gateway(nearest)
        }
    };
    let exposed = topology.pools.values().filter(|pool| pool.exposed).flat_map(|pool| pool.members.values()).map(|member| member.outer);
    let api_servers = topology.api_servers.iter().filter_map(|address| if let IpAddr::V4(v4) = address { Some(*v4) } else { None });
    let taken: BTreeSet<Ipv4Addr> = exposed.chain(api_servers).collect();
    let mut nodes: BTreeMap<Ipv4Addr, Vec<(String, String)>> = BTreeMap::new();
    for (name, pool) in topology.pools.iter().filter(|(_, pool)| !pool.exposed) {
        for (node, member) in pool.members.iter().filter(|(_, member)| !taken.contains(&member.outer)) {
            nodes.entry(member.outer).or_default().push((node.clone(), name.clone()));
        }
    }
    let ports = topology.ports.https.union(&topology.ports.http).copied().collect();
    Some(Detour { to, nodes, ports })
}

fn clouds(topology: &Topology) -> BTreeMap<String, (String, u16)> {
    let exposed = topology.pools.values().filter(|pool| pool.exposed);
    exposed.flat_map(|pool| &pool.proxies).filter_map(|(node, proxy)| Some((node.clone(), proxy.dial.clone()?))).collect()
}

fn directory(topology: &Topology, own_pool: &str) -> Directory {
    let mut directory = Directory { own_pool: own_pool.to_owned(), ports: topology.ports.clone(), ..Directory::default() };
    for (name, pool) in &topology.pools {
        for (node, member) in &pool.members {
            let address = IpAddr::V4(member.outer);
            directory.nodes.insert(node.clone(), Target { node: node.clone(), pool: name.clone(), address });
            directory.addresses.entry(address).or_default().insert(node.clone());
        }
        if !pool.exposed {
            directory.proxies.extend(pool.proxies.iter().map(|(node, proxy)| (node.clone(), (proxy.uid.clone(), name.clone()))));
        }
    }
    directory
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::topology::{Member, ProxyPeer};

    fn pool(exposed: bool, nodes: &[(&str, [u8; 4])], proxy: &str) -> Pool {
        let members = nodes.iter().map(|(name, ip)| ((*name).to_owned(), Member { outer: (*ip).into(), prefixes: BTreeSet::new() }));
        let dial = exposed.then(|| ("198.51.100.10".to_owned(), 10262));
        let proxies = BTreeMap::from([(proxy.to_owned(), ProxyPeer { dial, port: 10262, ..ProxyPeer::default() })]);
        Pool { exposed, members: members.collect(), proxies, ..Pool::default() }
    }

    fn topology() -> Topology {
        let pools = BTreeMap::from([
            ("cloud".to_owned(), pool(true, &[("c1", [10, 0, 0, 1]), ("c2", [10, 0, 0, 2])], "c1")),
            ("edge-x".to_owned(), pool(false, &[("x1", [10, 1, 0, 1]), ("x2", [192, 168, 0, 2])], "x1")),
            ("edge-y".to_owned(), pool(false, &[("y1", [10, 2, 0, 1]), ("y2", [192, 168, 0, 2])], "y1")),
        ]);
        Topology { pools, ..Topology::default() }
    }

    #[test]
    fn the_elected_have_a_role_and_nobody_else() {
        let topology = topology();
        assert_eq!(plan(&topology, "c1", None).role, Role::Cloud { port: 10262, names: BTreeSet::from(["198.51.100.10".to_owned()]) });
        assert_eq!(plan(&topology, "x1", None).role, Role::Edge(BTreeMap::from([("c1".to_owned(), ("198.51.100.10".to_owned(), 10262))])));
        for node in ["c2", "x2", "nobody"] {
            assert_eq!(plan(&topology, node, None).role, Role::None, "{node}");
        }
        let mut off = topology;
        off.settings.l7 = false;
        assert_eq!(plan(&off, "c1", None), Plan::default());
    }

    #[test]
    fn an_address_that_two_nodes_have_is_never_guessed() {
        let directory = plan(&topology(), "c1", None).directory;
        assert_eq!(directory.by_address([10, 1, 0, 1].into(), 10250).map(|t| t.node.as_str()), Ok("x1"));
        assert_eq!(directory.by_name("y2", 10255).map(|t| t.pool.as_str()), Ok("edge-y"));
        let both = directory.by_address([192, 168, 0, 2].into(), 10250);
        assert_eq!(both, Err(NotFound::Ambiguous { address: [192, 168, 0, 2].into(), nodes: vec!["x2".into(), "y2".into()] }));
    }

    #[test]
    fn the_cloud_takes_edge_nodes_by_address_and_the_edge_takes_nobody() {
        let topology = topology();
        let here = plan(&topology, "c1", None).detour.expect("a gateway node");
        assert_eq!((here.to, here.ports), (DetourTo::Here, BTreeSet::from([10250, 10255])));
        assert_eq!(here.nodes[&Ipv4Addr::new(10, 1, 0, 1)], [("x1".to_owned(), "edge-x".to_owned())]);
        assert_eq!(here.nodes[&Ipv4Addr::new(192, 168, 0, 2)].len(), 2, "both, so that who dials it is told");
        assert!(!here.nodes.contains_key(&Ipv4Addr::new(10, 0, 0, 2)), "its own pool");
        assert_eq!(plan(&topology, "c2", None).detour.map(|d| d.to), Some(DetourTo::Gateway([10, 0, 0, 1].into())));
        assert_eq!(plan(&topology, "x1", None).detour, None);
    }

    #[test]
    fn an_edge_that_calls_itself_by_another_machines_address_gets_none_of_its_traffic() {
        let mut topology = topology();
        topology.pools.insert("cloud-2".to_owned(), pool(true, &[("d1", [10, 9, 0, 1])], "d1"));
        topology.api_servers.insert([10, 9, 9, 9].into());
        let edge = topology.pools.get_mut("edge-x").expect("it is there");
        for (name, address) in [("x3", [10, 9, 0, 1]), ("x4", [10, 9, 9, 9]), ("x5", [10, 1, 0, 5])] {
            edge.members.insert(name.to_owned(), Member { outer: address.into(), prefixes: BTreeSet::new() });
        }
        let nodes = plan(&topology, "c1", None).detour.expect("a gateway node").nodes;
        let taken = |address: [u8; 4]| nodes.contains_key(&Ipv4Addr::from(address));
        assert!(!taken([10, 9, 0, 1]), "another exposed pool's");
        assert!(!taken([10, 9, 9, 9]), "the API server's");
        assert!(taken([10, 1, 0, 5]));
    }

    #[test]
    fn a_proxy_that_works_is_preferred_and_where_none_seems_to_any_will_do() {
        let mut topology = topology();
        let cloud = topology.pools.get_mut("cloud").expect("it is there");
        cloud.members.insert("c3".to_owned(), Member { outer: [10, 0, 0, 3].into(), prefixes: BTreeSet::new() });
        cloud.proxies.insert("c3".to_owned(), ProxyPeer { port: 10262, ..ProxyPeer::default() });
        let way = |topology: &Topology| plan(topology, "c2", None).detour.expect("an ordinary node").to;
        let by_hash = way(&topology);
        for (ready, other, address) in [("c1", "c3", [10, 0, 0, 1]), ("c3", "c1", [10, 0, 0, 3])] {
            let proxies = &mut topology.pools.get_mut("cloud").expect("it is there").proxies;
            proxies.get_mut(ready).expect("elected").ready = true;
            proxies.get_mut(other).expect("elected").ready = false;
            assert_eq!(way(&topology), DetourTo::Gateway(address.into()));
        }
        topology.pools.get_mut("cloud").expect("it is there").proxies.values_mut().for_each(|proxy| proxy.ready = true);
        assert_eq!(way(&topology), by_hash, "both ready: as if nothing had been said");
        for present in [[10, 0, 0, 1], [10, 0, 0, 3]] {
            let stays = plan(&topology, "c2", Some(present.into())).detour.expect("an ordinary node").to;
            assert_eq!(stays, DetourTo::Gateway(present.into()), "what is open there goes on");
        }
        topology.pools.get_mut("cloud").expect("it is there").proxies.get_mut("c1").expect("elected").ready = false;
        assert_eq!(plan(&topology, "c2", Some([10, 0, 0, 1].into())).detour.map(|d| d.to), Some(DetourTo::Gateway([10, 0, 0, 3].into())));
    }

    #[test]
    fn ports_and_names_that_are_not_listed_are_refused() {
        let directory = plan(&topology(), "c1", None).directory;
        assert_eq!(directory.by_name("x1", 22), Err(NotFound::Port(22)));
        assert_eq!(directory.by_name("169.254.169.254", 10250), Err(NotFound::Name("169.254.169.254".into())));
        assert_eq!(directory.by_address([127, 0, 0, 1].into(), 10250), Err(NotFound::Address([127, 0, 0, 1].into())));
    }

    #[test]
    fn who_was_elected_may_bring_a_tunnel_and_no_earlier_node_of_its_name() {
        let bearer = |node: &str, uid: Option<&str>| Bearer { node: node.to_owned(), uid: uid.map(str::to_owned) };
        let mut topology = topology();
        let directory = plan(&topology, "c1", None).directory;
        assert_eq!(directory.pool_of_proxy(&bearer("x1", Some("1"))), Some("edge-x"), "a controller that tells no UID");
        assert_eq!(directory.pool_of_proxy(&bearer("x2", None)), None, "not elected");
        assert_eq!(directory.pool_of_proxy(&bearer("c1", None)), None, "the cloud is dialled");
        topology.pools.get_mut("edge-x").expect("it is there").proxies.get_mut("x1").expect("elected").uid = Some("2".to_owned());
        let directory = plan(&topology, "c1", None).directory;
        assert_eq!(directory.pool_of_proxy(&bearer("x1", Some("2"))), Some("edge-x"));
        assert_eq!(directory.pool_of_proxy(&bearer("x1", Some("1"))), None, "deleted since");
        assert_eq!(directory.pool_of_proxy(&bearer("x1", None)), None);
        assert_eq!(plan(&topology, "x1", None).uid.as_deref(), Some("2"));
    }
}
