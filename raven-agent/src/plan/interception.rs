//! Interception: connections by address that a cloud node redirects to a proxy of its pool: those to kubelet ports of
//! edge nodes, and those to proxies of other exposed pools.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
};

use ipnet::IpNet;
use raven_api::prefix::is_routable;
use raven_common::tables::Remote;

use super::{me::Me, path::gateway_ids, proxy::service_ports, rendezvous::weight};
use crate::{
    state::{InterceptTo, Intercepted, Interception},
    topology::{Member, Pool, Topology},
};

/// The interception of this node, and the map entries by which the overlay carries it; `None` where
/// nothing is intercepted.
///
/// `in_prefixes`: this node's addresses inside its pod prefixes.
pub(super) fn interception(
    topology: &Topology,
    (own_pool, own): (&str, &Pool),
    me: &Me,
    member: &Member,
    in_prefixes: &[IpAddr],
) -> Option<(Interception, BTreeMap<IpNet, Remote>)> {
    if !own.exposed || !topology.settings.l7 {
        return None;
    }
    let to = destination(own, me)?;
    let sources = sources(to, own, me, member, in_prefixes);
    let kubelets = edge_nodes(topology, me, &sources);
    // Without a ready proxy here, those of other pools, which clients can perhaps reach, are better. On the proxy's own node
    // it need not be ready: open connections must outlive a wrong report.
    let ready = to == InterceptTo::Here || own.proxies.values().any(|proxy| proxy.ready);
    let proxies = if ready { other_proxies(topology, own_pool, own, me, &sources) } else { Nodes::new() };
    let ports = &topology.ports;
    let listeners = service_ports(ports).map(|(port, _)| port);
    let entries = kubelets.iter().chain(&proxies).map(|(address, nodes)| (*address, nodes.as_slice()));
    let entries = overlay_entries(topology, to, entries);
    let interception = Interception {
        to,
        sources,
        kubelets: Intercepted { nodes: names(&kubelets), ports: ports.https.union(&ports.http).copied().collect() },
        proxies: Intercepted { nodes: names(&proxies), ports: listeners.collect() },
    };
    Some((interception, entries))
}

/// The sources of host processes' connections, one for each family that is intercepted. Over the overlay, it is an address
/// that the gateway node accepts from this node.
fn sources(to: InterceptTo, own_pool: &Pool, me: &Me, member: &Member, in_prefixes: &[IpAddr]) -> Vec<IpAddr> {
    let own = || [&member.address].into_iter().chain(member.addresses.iter().filter(|a| me.addresses.contains(a)));
    let candidates: Vec<IpAddr> = match to {
        InterceptTo::Here => own().chain(in_prefixes).copied().collect(),
        InterceptTo::Gateway(_) => in_prefixes.iter().chain(own()).copied().collect(),
    };
    let intercepted = |ipv4: bool| match to {
        InterceptTo::Here => true,
        InterceptTo::Gateway(via) => {
            own_pool.members.values().filter(|gateway| gateway.outer == via).any(|gateway| has_family(gateway, ipv4))
        }
    };
    let of_family = |ipv4: bool| candidates.iter().copied().find(|address| address.is_ipv4() == ipv4);
    let usable = [true, false].into_iter().filter(|ipv4| (*ipv4 || me.ipv6) && intercepted(*ipv4));
    usable.filter_map(of_family).collect()
}

/// True if the node has an address or a pod prefix of the family, so that its proxy can answer in it.
fn has_family(node: &Member, ipv4: bool) -> bool {
    let addresses = node.addresses.iter().map(IpAddr::is_ipv4);
    addresses.chain(node.prefixes.iter().map(|prefix| prefix.addr().is_ipv4())).any(|is_ipv4| is_ipv4 == ipv4)
}

/// Nodes by address, as pairs of node and Gateway.
type Nodes<'a> = BTreeMap<IpAddr, Vec<(&'a str, &'a str)>>;

fn names(nodes: &Nodes) -> BTreeMap<IpAddr, String> {
    let joined = |nodes: &[(&str, &str)]| nodes.iter().map(|(node, _)| *node).collect::<Vec<_>>().join(" or ");
    nodes.iter().map(|(address, nodes)| (*address, joined(nodes))).collect()
}

/// The proxy on this node if it was elected, else a gateway node of the pool that runs one. The present choice is kept
/// while it works, because another one would break the open connections.
fn destination(own: &Pool, me: &Me) -> Option<InterceptTo> {
    if own.proxies.contains_key(&me.node) {
        return Some(InterceptTo::Here);
    }
    // If no proxy is reported ready, the report may be wrong: all are candidates.
    let any_ready = own.proxies.values().any(|proxy| proxy.ready);
    let usable = own.proxies.iter().filter(|(_, proxy)| proxy.ready || !any_ready);
    let usable = usable.filter_map(|(proxy, _)| Some((proxy, own.members.get(proxy)?.outer)));
    let (_, chosen) =
        usable.max_by_key(|(proxy, outer)| (me.intercepting_gateway == Some(*outer), weight(&[&me.node, proxy])))?;
    Some(InterceptTo::Gateway(chosen))
}

/// Proxies of other exposed pools, except at addresses that this pool or this node needs itself: two clouds may have the
/// same subnet.
fn other_proxies<'a>(topology: &'a Topology, own_pool: &str, own: &Pool, me: &Me, sources: &[IpAddr]) -> Nodes<'a> {
    let mut nodes = Nodes::new();
    let is_own = |address: &IpAddr| own.members.values().any(|member| member.addresses.contains(address));
    for (gateway, node, proxy) in topology.other_proxies(own_pool) {
        for address in proxy.addresses.iter().filter(|address| is_free(address, me, sources) && !is_own(address)) {
            nodes.entry(*address).or_default().push((node, gateway));
        }
    }
    nodes
}

/// True if this node does not need the address itself, and has a source for connections to it.
fn is_free(address: &IpAddr, me: &Me, sources: &[IpAddr]) -> bool {
    sources.iter().any(|source| source.is_ipv4() == address.is_ipv4())
        && is_routable(&IpNet::from(*address))
        && !me.addresses.contains(address)
        && !me.protected.iter().chain(&me.subnets).any(|p| p.contains(address))
}

/// Edge nodes by address. An address that several nodes have is included, so that the client gets an error that names them.
///
/// Excluded, whatever address an edge node claims: nodes of exposed pools, API servers, and what this
/// node needs itself.
fn edge_nodes<'a>(topology: &'a Topology, me: &Me, sources: &[IpAddr]) -> Nodes<'a> {
    let exposed = topology.pools.values().filter(|pool| pool.exposed).flat_map(|pool| pool.members.values());
    let excluded: BTreeSet<IpAddr> =
        exposed.flat_map(|member| &member.addresses).chain(&topology.api_servers).copied().collect();
    let free = |address: &&IpAddr| is_free(address, me, sources) && !excluded.contains(*address);
    let mut nodes = Nodes::new();
    for (gateway, pool) in topology.pools.iter().filter(|(_, pool)| !pool.exposed && pool.l7) {
        for (node, member) in &pool.members {
            for address in member.addresses.iter().filter(free) {
                nodes.entry(*address).or_default().push((node, gateway));
            }
        }
    }
    nodes
}

/// On a member node, the overlay carries these connections to the gateway node. The gateway node has no such entries
/// and hands the packets to its own stack.
fn overlay_entries<'a>(
    topology: &Topology,
    to: InterceptTo,
    nodes: impl Iterator<Item = (IpAddr, &'a [(&'a str, &'a str)])>,
) -> BTreeMap<IpNet, Remote> {
    let InterceptTo::Gateway(via) = to else { return BTreeMap::new() };
    let ids = gateway_ids(topology);
    let entries = nodes.filter_map(|(address, nodes)| {
        let (_, gateway) = nodes.first()?;
        Some((IpNet::from(address), Remote { gateway: *ids.get(*gateway)?, via: via.octets() }))
    });
    entries.collect()
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;

    use super::*;
    use crate::{
        plan::{
            fixture::{pool, three_sites},
            proxy::ByName,
        },
        topology::{Member, ProxyPeer},
    };

    fn intercept(topology: &Topology, node: &str, present: Option<Ipv4Addr>) -> Option<Interception> {
        planned(topology, node, present).map(|(interception, _)| interception)
    }

    fn planned(
        topology: &Topology,
        node: &str,
        present: Option<Ipv4Addr>,
    ) -> Option<(Interception, BTreeMap<IpNet, Remote>)> {
        let (name, own) = topology.pool_of(node).expect("a node of the topology");
        let me = Me { node: node.to_owned(), intercepting_gateway: present, ..Me::default() };
        interception(topology, (name, own), &me, &own.members[node], &[])
    }

    #[test]
    fn cloud_intercepts_edge_nodes_and_edges_intercept_nothing() {
        let topology = three_sites();
        let here = intercept(&topology, "c1", None).expect("a gateway node");
        assert_eq!((here.to, here.kubelets.ports), (InterceptTo::Here, BTreeSet::from([10250, 10255])));
        assert_eq!(here.kubelets.nodes[&IpAddr::from([10, 1, 0, 1])], "x1");
        assert_eq!(
            here.kubelets.nodes[&IpAddr::from([192, 168, 0, 2])],
            "x2 or y2",
            "both, so that the client's error names them"
        );
        assert!(!here.kubelets.nodes.contains_key(&IpAddr::from([10, 0, 0, 2])), "its own pool");
        assert_eq!(intercept(&topology, "c2", None).map(|i| i.to), Some(InterceptTo::Gateway([10, 0, 0, 1].into())));
        assert_eq!(intercept(&topology, "x1", None), None);
        let (_, entries) = planned(&topology, "c2", None).expect("a member node");
        let remote = Remote { gateway: gateway_ids(&topology)["edge-x"], via: [10, 0, 0, 1] };
        assert_eq!(entries[&"10.1.0.1/32".parse().expect("a prefix")], remote);
    }

    #[test]
    fn addresses_of_both_families_are_intercepted_where_this_node_has_a_source() {
        let mut topology = three_sites();
        let address = |text: &str| text.parse::<IpAddr>().expect("an address");
        let member = |topology: &mut Topology, pool: &str, node: &str, own: &[&str]| {
            let members = &mut topology.pools.get_mut(pool).expect("it is there").members;
            members.get_mut(node).expect("it is there").addresses.extend(own.iter().map(|text| address(text)));
        };
        member(&mut topology, "edge-x", "x1", &["fd10:1::1", "fe80::1", "::1"]);
        member(&mut topology, "cloud", "c1", &["fd10::1"]);
        let intercepted = |node: &str, own: &[&str], in_prefixes: &[&str]| {
            let (name, pool) = topology.pool_of(node).expect("a node of the topology");
            let addresses = own.iter().map(|text| address(text)).collect();
            let me = Me { node: node.to_owned(), addresses, ..Me::default() };
            let in_prefixes: Vec<IpAddr> = in_prefixes.iter().map(|text| address(text)).collect();
            interception(&topology, (name, pool), &me, &pool.members[node], &in_prefixes).expect("a cloud node")
        };
        let (here, _) = intercepted("c1", &["fd10::1"], &["10.244.1.1", "fd00::1"]);
        assert_eq!(here.sources, [address("10.0.0.1"), address("fd10::1")], "the node's own");
        let ipv6: Vec<&IpAddr> = here.kubelets.nodes.keys().filter(|a| a.is_ipv6()).collect();
        assert_eq!(ipv6, [&address("fd10:1::1")], "not link-local, not loopback");
        let (there, entries) = intercepted("c2", &[], &["10.244.2.1", "fd00::1"]);
        assert_eq!(there.sources, [address("10.244.2.1"), address("fd00::1")], "the gateway node accepts these");
        assert!(entries.contains_key(&"fd10:1::1/128".parse().expect("a prefix")));
        let (without, entries) = intercepted("c2", &[], &["10.244.2.1"]);
        assert!(without.kubelets.nodes.keys().all(IpAddr::is_ipv4) && entries.keys().all(|p| p.addr().is_ipv4()));
        let (from_pods, _) = intercepted("c1", &[], &["10.244.1.1", "fd00::1"]);
        assert_eq!(from_pods.sources, [address("10.0.0.1"), address("fd00::1")], "no address of its own");
        let gateway = topology.pools.get_mut("cloud").and_then(|pool| pool.members.get_mut("c1")).expect("it is there");
        gateway.addresses.retain(IpAddr::is_ipv4);
        let (name, pool) = topology.pool_of("c2").expect("a node of the topology");
        let me = Me { node: "c2".to_owned(), ..Me::default() };
        let in_prefixes = [address("10.244.2.1"), address("fd00::1")];
        let planned = interception(&topology, (name, pool), &me, &pool.members["c2"], &in_prefixes);
        let (member, _) = planned.expect("a cloud node");
        assert!(member.kubelets.nodes.keys().all(IpAddr::is_ipv4), "the gateway node cannot answer");
    }

    #[test]
    fn edge_that_claims_another_machines_address_is_not_intercepted_there() {
        let mut topology = three_sites();
        topology.pools.insert("cloud-2".to_owned(), pool(true, &[("d1", [10, 9, 0, 1])], "d1"));
        topology.api_servers.insert([10, 9, 9, 9].into());
        let edge = topology.pools.get_mut("edge-x").expect("it is there");
        for (name, address) in [("x3", [10, 9, 0, 1]), ("x4", [10, 9, 9, 9]), ("x5", [10, 1, 0, 5])] {
            edge.members.insert(name.to_owned(), Member::new(address.into()));
        }
        let nodes = intercept(&topology, "c1", None).expect("a gateway node").kubelets.nodes;
        let intercepted = |address: [u8; 4]| nodes.contains_key(&IpAddr::from(address));
        assert!(!intercepted([10, 9, 0, 1]), "a node of another exposed pool");
        assert!(!intercepted([10, 9, 9, 9]), "the API server");
        assert!(intercepted([10, 1, 0, 5]));
    }

    #[test]
    fn own_proxy_answers_for_the_proxies_of_other_exposed_pools() {
        let mut topology = three_sites();
        let nodes = [("d1", [10, 9, 0, 1]), ("d2", [10, 9, 0, 2])];
        topology.pools.insert("cloud-2".to_owned(), pool(true, &nodes, "d1"));
        let proxies = |topology: &Topology, node| intercept(topology, node, None).expect("a cloud node").proxies;
        assert!(proxies(&topology, "c2").nodes.is_empty(), "its own pool's proxy is not known to work");
        assert!(!proxies(&topology, "c1").nodes.is_empty(), "the proxy's node");
        for pool in topology.pools.values_mut().filter(|pool| pool.exposed) {
            pool.proxies.values_mut().for_each(|proxy| proxy.ready = true);
        }
        for (node, other, name) in
            [("c1", [10, 9, 0, 1], "d1"), ("c2", [10, 9, 0, 1], "d1"), ("d2", [10, 0, 0, 1], "c1")]
        {
            let expected = Intercepted {
                nodes: BTreeMap::from([(IpAddr::from(other), name.to_owned())]),
                ports: BTreeSet::from([10263, 10264]),
            };
            assert_eq!(proxies(&topology, node), expected, "{node}");
        }
        let (interception, entries) = planned(&topology, "c2", None).expect("a member node");
        let remote = Remote { gateway: gateway_ids(&topology)["cloud-2"], via: [10, 0, 0, 1] };
        assert_eq!(entries[&"10.9.0.1/32".parse().expect("a prefix")], remote);
        assert!(
            !interception.kubelets.nodes.contains_key(&IpAddr::from([10, 9, 0, 1])),
            "its kubelet is not intercepted"
        );
        let directory = crate::plan::proxy::proxy(&topology, &Me { node: "c1".to_owned(), ..Me::default() }).directory;
        let by = |address: [u8; 4], port| directory.service_port(IpAddr::V4(address.into()), port);
        assert_eq!(
            (by([10, 9, 0, 1], 10263), by([10, 9, 0, 1], 10264)),
            (Some(ByName::Tls(10250)), Some(ByName::Plain))
        );
        assert_eq!((by([10, 9, 0, 1], 10250), by([10, 9, 0, 2], 10264), by([10, 0, 0, 1], 10264)), (None, None, None));
        // The second cloud has the same subnet.
        topology
            .pools
            .get_mut("cloud-2")
            .expect("it is there")
            .members
            .insert("d1".to_owned(), Member::new([10, 0, 0, 2].into()));
        assert!(proxies(&topology, "c1").nodes.is_empty());
    }

    #[test]
    fn ready_proxy_is_preferred_and_without_one_any_is_chosen() {
        let mut topology = three_sites();
        let cloud = topology.pools.get_mut("cloud").expect("it is there");
        cloud.members.insert("c3".to_owned(), Member::new([10, 0, 0, 3].into()));
        cloud.proxies.insert("c3".to_owned(), ProxyPeer { port: 10262, ..ProxyPeer::default() });
        let to = |topology: &Topology| intercept(topology, "c2", None).expect("a member node").to;
        let by_hash = to(&topology);
        for (ready, other, address) in [("c1", "c3", [10, 0, 0, 1]), ("c3", "c1", [10, 0, 0, 3])] {
            let proxies = &mut topology.pools.get_mut("cloud").expect("it is there").proxies;
            proxies.get_mut(ready).expect("elected").ready = true;
            proxies.get_mut(other).expect("elected").ready = false;
            assert_eq!(to(&topology), InterceptTo::Gateway(address.into()));
        }
        topology.pools.get_mut("cloud").expect("it is there").proxies.values_mut().for_each(|proxy| proxy.ready = true);
        assert_eq!(to(&topology), by_hash, "all ready: the same choice as with none ready");
        for present in [[10, 0, 0, 1], [10, 0, 0, 3]] {
            let kept = intercept(&topology, "c2", Some(present.into())).expect("a member node").to;
            assert_eq!(kept, InterceptTo::Gateway(present.into()), "open connections continue");
        }
        topology.pools.get_mut("cloud").expect("it is there").proxies.get_mut("c1").expect("elected").ready = false;
        let moved = intercept(&topology, "c2", Some([10, 0, 0, 1].into())).map(|i| i.to);
        assert_eq!(moved, Some(InterceptTo::Gateway([10, 0, 0, 3].into())));
    }
}
