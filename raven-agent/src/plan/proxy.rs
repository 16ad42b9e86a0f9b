//! The L7 part of the plan: what this node does for the proxy, which proxies it dials, and which node a name or
//! an address denotes.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
};

use raven_api::proxy::{INTERNAL_INSECURE_PORT, Ports, secure_listener};

use super::Me;
use crate::topology::{Pool, Topology};

/// Everything that the proxy of this node does follows from this.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ProxyPlan {
    /// What this node does.
    pub role: ProxyRole,
    /// The UID that its certificate must carry, where it is known.
    pub uid: Option<String>,
    /// Names and addresses of all nodes.
    pub directory: Directory,
    /// Certificates (PEM) of the CA that signs the proxies' certificates; empty until the controller has published one.
    pub ca: String,
}

/// What this node does for the L7 half.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum ProxyRole {
    /// No proxy runs here.
    #[default]
    None,
    /// In the cloud: accepts requests, and passes them through the proxy connections that edges open.
    Cloud {
        /// TCP port that edges dial.
        port: u16,
        /// Names and addresses that edges dial; its certificate is issued for them.
        names: BTreeSet<String>,
        /// The other proxies of the pool: their addresses inside it, by node.
        siblings: BTreeMap<String, IpAddr>,
    },
    /// At an edge: dials these cloud gateway nodes (host and port, by node name) and serves the connections.
    Edge(BTreeMap<String, (String, u16)>),
}

/// Names and addresses of nodes.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Directory {
    /// The pool of this node.
    pub own_pool: String,
    /// Ports of nodes that the L7 half reaches.
    pub ports: Ports,
    nodes: BTreeMap<String, Target>,
    addresses: BTreeMap<IpAddr, BTreeSet<String>>,
    /// Addresses of the proxies of other exposed pools.
    others: BTreeSet<IpAddr>,
    /// This node and where it is, if not at the address of its Node object: after a change (DHCP, LTE), the object has the
    /// old one for a while.
    moved: Option<(String, IpAddr)>,
    /// Edge nodes that may open a proxy connection: their UID where it is known, and the pool that they serve.
    proxies: BTreeMap<String, (Option<String>, String)>,
}

/// The identity that an edge's certificate proves.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EdgeIdentity {
    /// Name of the node.
    pub node: String,
    /// UID of the Node object that the certificate was issued for.
    pub uid: Option<String>,
}

/// A node that a client wants to reach.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Target {
    /// Name of the node.
    pub node: String,
    /// Its pool.
    pub pool: String,
    /// Its address inside its pool.
    pub address: IpAddr,
}

/// How a request names its target.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum ByName {
    /// By TLS server name; the target port is fixed.
    Tls(u16),
    /// By the head of a plain HTTP request.
    Plain,
}

/// Ports of the proxies' Service at its endpoints.
pub(super) fn service_ports(ports: &Ports) -> impl Iterator<Item = (u16, ByName)> {
    let tls = ports.https.iter().map(|port| (secure_listener(*port), ByName::Tls(*port)));
    tls.chain([(INTERNAL_INSECURE_PORT, ByName::Plain)])
}

/// Why a name or an address denotes no node that can be reached.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NotFound {
    /// No node has the name.
    #[error("no node of this cluster is called {0:?}")]
    Name(String),
    /// No node has the address.
    #[error("no node of this cluster has the address {0}")]
    Address(IpAddr),
    /// Several nodes have the address; none is chosen.
    #[error("the address {address} belongs to several nodes ({}): reach them by name", nodes.join(", "))]
    Ambiguous {
        /// The address.
        address: IpAddr,
        /// Names of the nodes.
        nodes: Vec<String>,
    },
    /// The L7 half does not reach this port.
    #[error("port {0} is not listed; list it in proxyConfig.proxyHTTPPort or proxyHTTPSPort of an exposed Gateway")]
    Port(u16),
}

/// The L7 part of the plan.
pub(super) fn proxy(topology: &Topology, me: &Me) -> ProxyPlan {
    let ca = topology.proxy_ca.clone();
    let Some((own_pool, pool)) = topology.pool_of(&me.node).filter(|_| topology.settings.l7) else {
        return ProxyPlan { ca, ..ProxyPlan::default() };
    };
    let own = pool.proxies.get(&me.node);
    let role = match own {
        Some(own) if pool.exposed => ProxyRole::Cloud {
            port: own.port,
            names: own.dial.iter().map(|(host, _)| host.clone()).collect(),
            siblings: siblings(pool, &me.node),
        },
        Some(_) => ProxyRole::Edge(cloud_proxies(topology)),
        None => ProxyRole::None,
    };
    ProxyPlan { role, uid: own.and_then(|own| own.uid.clone()), directory: directory(topology, own_pool, me), ca }
}

fn siblings(pool: &Pool, node: &str) -> BTreeMap<String, IpAddr> {
    let others = pool.proxies.keys().filter(|other| *other != node);
    others.filter_map(|other| Some((other.clone(), pool.members.get(other)?.address))).collect()
}

fn cloud_proxies(topology: &Topology) -> BTreeMap<String, (String, u16)> {
    let exposed = topology.pools.values().filter(|pool| pool.exposed);
    exposed
        .flat_map(|pool| &pool.proxies)
        .filter_map(|(node, proxy)| Some((node.clone(), proxy.dial.clone()?)))
        .collect()
}

fn directory(topology: &Topology, own_pool: &str, me: &Me) -> Directory {
    let mut directory =
        Directory { own_pool: own_pool.to_owned(), ports: topology.ports.clone(), ..Directory::default() };
    directory.moved = me.moved_to.map(|address| (me.node.clone(), address));
    directory.others.extend(topology.other_proxies(own_pool).flat_map(|(_, _, proxy)| &proxy.addresses));
    for (name, pool) in &topology.pools {
        for (node, member) in &pool.members {
            for address in &member.addresses {
                directory.addresses.entry(*address).or_default().insert(node.clone());
            }
            let target = Target { node: node.clone(), pool: name.clone(), address: member.address };
            directory.nodes.insert(node.clone(), target);
        }
        if !pool.exposed {
            directory
                .proxies
                .extend(pool.proxies.iter().map(|(node, proxy)| (node.clone(), (proxy.uid.clone(), name.clone()))));
        }
    }
    directory
}

// === impl Directory ===

impl Directory {
    /// The node with this name. Fails if `port` is not one that the L7 half reaches.
    pub fn by_name(&self, name: &str, port: u16) -> Result<&Target, NotFound> {
        let target = self.nodes.get(name).ok_or_else(|| NotFound::Name(name.to_owned()))?;
        self.allowed(target, port)
    }

    /// The one node with this address. Fails if several have it, or if `port` is not one that the L7 half reaches.
    pub fn by_address(&self, address: IpAddr, port: u16) -> Result<&Target, NotFound> {
        let nodes = self.addresses.get(&address).ok_or(NotFound::Address(address))?;
        match (nodes.len(), nodes.first().and_then(|name| self.nodes.get(name))) {
            (1, Some(target)) => self.allowed(target, port),
            _ => Err(NotFound::Ambiguous { address, nodes: nodes.iter().cloned().collect() }),
        }
    }

    /// How requests by name are read that a client sent to this address and port, if these are a proxy of another exposed
    /// pool and a port of the proxies' Service.
    pub fn service_port(&self, address: IpAddr, port: u16) -> Option<ByName> {
        if !self.others.contains(&address) {
            return None;
        }
        service_ports(&self.ports).find_map(|(listener, by)| (listener == port).then_some(by))
    }

    fn allowed<'a>(&self, target: &'a Target, port: u16) -> Result<&'a Target, NotFound> {
        if self.ports.contains(port) { Ok(target) } else { Err(NotFound::Port(port)) }
    }

    /// Where to connect to a node of this node's pool.
    pub fn reached_at(&self, target: &Target) -> IpAddr {
        match &self.moved {
            Some((node, address)) if *node == target.node => *address,
            _ => target.address,
        }
    }

    /// The address of a node inside its pool, as its Node object has it.
    pub fn address_of(&self, node: &str) -> Option<IpAddr> {
        self.nodes.get(node).map(|target| target.address)
    }

    /// The pool of a node.
    pub fn pool_of(&self, node: &str) -> Option<&str> {
        self.nodes.get(node).map(|target| target.pool.as_str())
    }

    /// The pool that this edge may open proxy connections for: the node is elected for it, and the certificate was not
    /// issued to an earlier node of the same name.
    pub fn pool_of_proxy(&self, edge: &EdgeIdentity) -> Option<&str> {
        let (uid, pool) = self.proxies.get(&edge.node)?;
        (uid.is_none() || *uid == edge.uid).then_some(pool.as_str())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::plan::fixture::three_sites;

    /// The plan of a node.
    fn plan_of(topology: &Topology, node: &str) -> ProxyPlan {
        proxy(topology, &Me { node: node.to_owned(), ..Me::default() })
    }

    #[test]
    fn only_elected_nodes_have_a_role() {
        let topology = three_sites();
        assert_eq!(
            plan_of(&topology, "c1").role,
            ProxyRole::Cloud {
                port: 10262,
                names: BTreeSet::from(["198.51.100.10".to_owned()]),
                siblings: BTreeMap::new()
            }
        );
        assert_eq!(
            plan_of(&topology, "x1").role,
            ProxyRole::Edge(BTreeMap::from([("c1".to_owned(), ("198.51.100.10".to_owned(), 10262))]))
        );
        for node in ["c2", "x2", "stranger"] {
            assert_eq!(plan_of(&topology, node).role, ProxyRole::None, "{node}");
        }
        let mut off = topology;
        off.settings.l7 = false;
        assert_eq!(plan_of(&off, "c1"), ProxyPlan::default());
    }

    #[test]
    fn own_node_is_dialled_where_it_is_now() {
        let moved = Me { node: "x1".to_owned(), moved_to: Some([10, 1, 0, 77].into()), ..Me::default() };
        let directory = proxy(&three_sites(), &moved).directory;
        let reached_at = |name: &str| directory.reached_at(directory.by_name(name, 10250).expect("a node"));
        assert_eq!(reached_at("x1"), IpAddr::from([10, 1, 0, 77]));
        assert_eq!(reached_at("x2"), IpAddr::from([192, 168, 0, 2]));
        assert_eq!(directory.address_of("x1"), Some([10, 1, 0, 1].into()), "listeners do not move");
        let by_address = directory.by_address([10, 1, 0, 1].into(), 10250);
        assert_eq!(by_address.map(|t| t.node.as_str()), Ok("x1"), "clients know the old address");
    }

    #[test]
    fn address_of_two_nodes_is_ambiguous() {
        let directory = plan_of(&three_sites(), "c1").directory;
        assert_eq!(directory.by_address([10, 1, 0, 1].into(), 10250).map(|t| t.node.as_str()), Ok("x1"));
        assert_eq!(directory.by_name("y2", 10255).map(|t| t.pool.as_str()), Ok("edge-y"));
        let both = directory.by_address([192, 168, 0, 2].into(), 10250);
        assert_eq!(
            both,
            Err(NotFound::Ambiguous { address: [192, 168, 0, 2].into(), nodes: vec!["x2".into(), "y2".into()] })
        );
    }

    #[test]
    fn unlisted_ports_and_unknown_names_are_refused() {
        let directory = plan_of(&three_sites(), "c1").directory;
        assert_eq!(directory.by_name("x1", 22), Err(NotFound::Port(22)));
        assert_eq!(directory.by_name("169.254.169.254", 10250), Err(NotFound::Name("169.254.169.254".into())));
        assert_eq!(directory.by_address([127, 0, 0, 1].into(), 10250), Err(NotFound::Address([127, 0, 0, 1].into())));
    }

    #[test]
    fn only_the_elected_node_itself_may_open_a_proxy_connection() {
        let edge = |node: &str, uid: Option<&str>| EdgeIdentity { node: node.to_owned(), uid: uid.map(str::to_owned) };
        let mut topology = three_sites();
        let directory = plan_of(&topology, "c1").directory;
        assert_eq!(
            directory.pool_of_proxy(&edge("x1", Some("1"))),
            Some("edge-x"),
            "the controller has published no UID"
        );
        assert_eq!(directory.pool_of_proxy(&edge("x2", None)), None, "not elected");
        assert_eq!(directory.pool_of_proxy(&edge("c1", None)), None, "the cloud is dialled");
        topology.pools.get_mut("edge-x").expect("it is there").proxies.get_mut("x1").expect("elected").uid =
            Some("2".to_owned());
        let directory = plan_of(&topology, "c1").directory;
        assert_eq!(directory.pool_of_proxy(&edge("x1", Some("2"))), Some("edge-x"));
        assert_eq!(directory.pool_of_proxy(&edge("x1", Some("1"))), None, "an earlier node of this name");
        assert_eq!(directory.pool_of_proxy(&edge("x1", None)), None);
        assert_eq!(plan_of(&topology, "x1").uid.as_deref(), Some("2"));
    }
}
