//! Properties of `plan` over random clusters, and examples on the three-pool cluster of the demo.

use proptest::{collection, prelude::*, sample::Index};
use raven_api::{
    Gateway, GatewayNode, GatewaySpec, GatewayStatus,
    gateway::{Encryption, Endpoint, EndpointType, ExposeType, NodeInfo, ProxyConfig, TunnelConfig},
    gateway_node::GatewayNodeSpec,
};

use super::*;
use crate::{
    state::InterceptTo,
    topology::{Inputs, PublicKey, build},
};

/// A pool as the controller publishes it: `nodes` nodes, of which the first `gateways` are elected.
#[derive(Clone, Debug)]
struct Site {
    exposed: bool,
    nodes: u8,
    gateways: u8,
    published: bool,
    overlaps: bool,
    encrypted: bool,
}

fn site() -> impl Strategy<Value = Site> {
    (any::<(bool, bool)>(), 1u8..5, 0u8..3, prop::bool::weighted(0.9), prop::bool::weighted(0.1)).prop_map(
        |((exposed, encrypted), nodes, gateways, published, overlaps)| Site {
            exposed,
            nodes,
            gateways: gateways.min(nodes),
            published,
            overlaps,
            encrypted,
        },
    )
}

fn node_name(site: usize, node: u8) -> String {
    format!("s{site}-n{node}")
}

fn key(site: usize, node: u8) -> PublicKey {
    PublicKey([site as u8 * 16 + node + 1; 32])
}

fn gateway(n: usize, site: &Site) -> Gateway {
    let mut gateway = Gateway::new(&format!("site-{n}"), GatewaySpec::default());
    if site.exposed {
        gateway.spec.expose_type = ExposeType::PublicIP;
    }
    if site.encrypted {
        gateway.spec.encryption = Encryption::Pool;
    }
    // An overlapping site claims the pod prefixes of site 0.
    let block = if site.overlaps { 0 } else { n };
    let node = |i: u8| NodeInfo {
        node_name: node_name(n, i),
        private_ip: format!("192.168.{n}.{}", 10 + i),
        subnets: vec![format!("10.{block}.{i}.0/24"), format!("fd00:{block:x}:{i:x}::/64")],
        public_key: (site.encrypted && site.published).then(|| key(n, i).to_string()),
        ..NodeInfo::default()
    };
    let endpoint = |i: u8| Endpoint {
        node_name: node_name(n, i),
        under_nat: !site.exposed,
        public_ip: site.exposed.then(|| format!("198.51.100.{n}")),
        ..Endpoint::default()
    };
    gateway.status = Some(GatewayStatus {
        nodes: (0..site.nodes).map(node).collect(),
        active_endpoints: (0..site.gateways).map(endpoint).collect(),
        ..GatewayStatus::default()
    });
    gateway
}

fn inputs(sites: &[Site]) -> Inputs {
    let keys = sites.iter().enumerate().filter(|(_, s)| s.published).flat_map(|(n, site)| {
        (0..site.gateways).map(move |i| {
            let public_key = Some(key(n, i).to_string());
            GatewayNode::new(&node_name(n, i), GatewayNodeSpec { public_key, ..GatewayNodeSpec::default() })
        })
    });
    Inputs {
        gateways: sites.iter().enumerate().map(|(n, s)| gateway(n, s)).collect(),
        gateway_nodes: keys.collect(),
        ..Inputs::default()
    }
}

fn me(site: usize, node: u8) -> Me {
    Me { node: node_name(site, node), ..Me::default() }
}

fn every_node(sites: &[Site]) -> Vec<Me> {
    sites.iter().enumerate().flat_map(|(n, s)| (0..s.nodes).map(move |i| me(n, i))).collect()
}

fn sites() -> impl Strategy<Value = Vec<Site>> {
    collection::vec(site(), 1..6)
}

proptest! {
    #[test]
    fn plan_is_deterministic_and_independent_of_event_order(sites in sites(), shuffle in any::<Index>()) {
        let inputs = inputs(&sites);
        let mut turned = inputs.clone();
        let by = shuffle.index(turned.gateways.len());
        turned.gateways.rotate_left(by);
        turned.gateway_nodes.reverse();
        for me in every_node(&sites) {
            let one = plan(&build(&inputs), &me);
            prop_assert_eq!(&one, &plan(&build(&inputs), &me));
            prop_assert_eq!(format!("{one:?}"), format!("{:?}", plan(&build(&turned), &me)));
        }
    }

    #[test]
    fn prefix_has_one_peer(sites in sites()) {
        let topology = build(&inputs(&sites));
        for me in every_node(&sites) {
            let plan = plan(&topology, &me);
            let mut seen = BTreeSet::new();
            for peer in plan.state.peers.values() {
                for prefix in &peer.allowed {
                    prop_assert!(seen.insert(*prefix), "{prefix} has two peers on {}", me.node);
                }
            }
            let all: Vec<_> = plan.state.remote.keys().chain(plan.state.local.keys()).collect();
            for (n, a) in all.iter().enumerate() {
                prop_assert!(!all[n + 1..].iter().any(|b| a.contains(*b) || b.contains(*a)), "{a} overlaps on {}", me.node);
            }
        }
    }

    #[test]
    fn both_ends_of_a_path_agree(sites in sites()) {
        // The peer that receives a packet accepts its source from the gateway node that sent it: checked hop by hop for
        // each pair of nodes.
        let topology = build(&inputs(&sites));
        let plans: BTreeMap<String, Plan> = every_node(&sites).into_iter().map(|me| (me.node.clone(), plan(&topology, &me))).collect();
        for from in plans.keys() {
            for to in plans.keys().filter(|to| plans[*to].pool != plans[from].pool) {
                follow(&topology, &plans, from, to)?;
            }
        }
    }

    #[test]
    fn routes_and_maps_have_the_same_prefixes(sites in sites()) {
        let topology = build(&inputs(&sites));
        for me in every_node(&sites) {
            let plan = plan(&topology, &me);
            prop_assert!(plan.state.routes.keys().eq(plan.state.remote.keys()));
            let encrypted = topology.pool_of(&me.node).is_some_and(|(_, pool)| pool.encrypted);
            prop_assert_eq!(plan.tunnel.is_some(), plan.role == Role::Gateway || encrypted);
        }
    }
}

/// Follows a packet between two nodes: a path that a plan offers must reach its destination.
fn follow(topology: &Topology, plans: &BTreeMap<String, Plan>, from: &str, to: &str) -> Result<(), TestCaseError> {
    let prefix_of =
        |node: &str| topology.pool_of(node).and_then(|(_, p)| p.members[node].prefixes.iter().next().copied());
    let (Some(source), Some(destination)) = (prefix_of(from), prefix_of(to)) else { return Ok(()) };
    let by_outer = |pool: &Pool, outer: [u8; 4]| {
        pool.members.iter().find(|(_, m)| m.outer.octets() == outer).map(|(n, _)| n.clone())
    };
    let (_, own) = topology.pool_of(from).expect("planned nodes are in pools");
    let remote = plans[from].state.remote[&destination];
    let mut at = match plans[from].role {
        Role::Gateway => from.to_owned(),
        _ if own.encrypted => from.to_owned(),
        // No gateway node: dropped at the source, by the plan.
        _ if remote.via == [0; 4] => return Ok(()),
        _ => by_outer(own, remote.via).expect("via is a node of the pool"),
    };
    let key_of = |node: &str| plans[node].peer_names.iter().find(|(_, name)| name.node == node).map(|(key, _)| *key);
    for _hop in 0..5 {
        let Some(sender) = key_of(&at) else { return Ok(()) };
        let next = plans[&at]
            .state
            .peers
            .iter()
            .find(|(_, p)| p.allowed.contains(&destination))
            .map(|(k, _)| plans[&at].peer_names[k].node.clone());
        let Some(next) = next else {
            prop_assert!(
                plans[&at].problems.iter().any(|p| p.contains("cannot be reached") || p.contains("published"))
                    || topology.pool_of(to).is_some_and(|(_, p)| p.usable().next().is_none()),
                "{at} drops {from} → {to} and reports no problem"
            );
            return Ok(());
        };
        let accepts = plans[&next].state.peers.get(&sender).is_some_and(|p| p.allowed.contains(&source));
        prop_assert!(accepts, "{next} does not accept {source} from {at} ({from} → {to})");
        let pool_of = |node: &str| topology.pool_of(node).expect("planned nodes are in pools");
        let (name, pool) = pool_of(&next);
        if next == to || (name == pool_of(to).0 && !pool.encrypted) {
            return Ok(());
        }
        let inside = pool.encrypted && [from, to].iter().any(|end| pool_of(end).0 == name);
        prop_assert!(plans[&next].config.relay || inside, "{next} would have to relay {from} → {to}");
        at = next;
    }
    Err(TestCaseError::fail(format!("{from} → {to} loops")))
}

fn three_pools() -> Vec<Site> {
    let site = |exposed| Site { exposed, nodes: 2, gateways: 1, published: true, overlaps: false, encrypted: false };
    vec![site(true), site(false), site(false)]
}

#[test]
fn edge_gateway_has_one_peer_that_relays_the_other_edge() {
    let topology = build(&inputs(&three_pools()));
    let plan = plan(&topology, &me(1, 0));
    assert_eq!(plan.role, Role::Gateway);
    assert_eq!(plan.problems, Vec::<String>::new());
    let peers: Vec<_> = plan.state.peers.values().collect();
    assert_eq!(peers.len(), 1);
    assert_eq!(peers[0].endpoint, Some("198.51.100.0:4500".parse().expect("an endpoint")));
    assert_eq!(peers[0].keepalive, Some(15));
    let allowed: Vec<String> = peers[0].allowed.iter().map(ToString::to_string).filter(|p| p.contains('.')).collect();
    assert_eq!(allowed, ["10.0.0.0/24", "10.0.1.0/24", "10.2.0.0/24", "10.2.1.0/24"]);
}

#[test]
fn cloud_gateway_dials_neither_edge_and_relays() {
    let plan = plan(&build(&inputs(&three_pools())), &me(0, 0));
    assert!(plan.config.relay);
    assert_eq!(plan.state.peers.len(), 2);
    assert!(plan.state.peers.values().all(|p| p.endpoint.is_none() && p.keepalive.is_none() && p.allowed.len() == 4));
}

#[test]
fn nodes_of_a_pool_with_encryption_are_peers_of_its_gateway_node() {
    let mut sites = three_pools();
    sites[1].encrypted = true;
    let topology = build(&inputs(&sites));
    let (gateway, member) = (plan(&topology, &me(1, 0)), plan(&topology, &me(1, 1)));
    assert_eq!((gateway.role, member.role), (Role::Gateway, Role::Member));
    assert_eq!((&gateway.problems, &member.problems), (&vec![], &vec![]));
    assert!(gateway.config.encrypted && member.config.encrypted);
    let inside = &gateway.state.peers[&key(1, 1)];
    assert_eq!(inside.endpoint, Some("192.168.1.11:4500".parse().expect("an endpoint")));
    assert_eq!((inside.keepalive, inside.allowed.len()), (Some(15), 2), "its own prefixes");
    let [(to, peer)] = member.state.peers.iter().collect::<Vec<_>>()[..] else { panic!("{:?}", member.state.peers) };
    assert_eq!((*to, peer.endpoint), (key(1, 0), Some("192.168.1.10:4500".parse().expect("an endpoint"))));
    assert_eq!(peer.allowed.iter().collect::<Vec<_>>(), member.state.routes.keys().collect::<Vec<_>>());
    assert!(member.state.routes.values().all(|route| route.device == Device::Tunnel));
    assert!(member.state.remote.values().all(|remote| remote.via == [0; 4]), "no overlay");
    // Other pools have only the gateway node as a peer.
    let cloud = plan(&topology, &me(0, 0));
    assert!(cloud.state.peers.contains_key(&key(1, 0)) && !cloud.state.peers.contains_key(&key(1, 1)));

    // The port of a member is that of its endpoint, as if it were elected.
    let mut inputs = inputs(&sites);
    let endpoint = Endpoint { node_name: node_name(1, 1), port: Some(51820), ..Endpoint::default() };
    inputs.gateways[1].spec.endpoints = vec![endpoint];
    let other = build(&inputs);
    assert_eq!(plan(&other, &me(1, 1)).tunnel.map(|tunnel| tunnel.port), Some(51820));
    let dialled = plan(&other, &me(1, 0)).state.peers[&key(1, 1)].endpoint;
    assert_eq!(dialled.map(|endpoint| endpoint.port()), Some(51820));

    // A member whose agent is older publishes no key.
    inputs.gateways[1].status.as_mut().expect("a status").nodes[1].public_key = None;
    let gateway = plan(&build(&inputs), &me(1, 0));
    assert!(!gateway.state.peers.contains_key(&key(1, 1)));
    assert!(gateway.problems[0].contains("node s1-n1 has published no WireGuard key"), "{:?}", gateway.problems);
}

#[test]
fn member_with_a_tunnel_does_not_intercept_what_the_tunnel_carries() {
    let mut sites = three_pools();
    sites[0].encrypted = true;
    let mut inputs = inputs(&sites);
    inputs.settings.forward_node_ip = true;
    let endpoint = Endpoint { node_name: node_name(0, 0), type_: EndpointType::Proxy, ..Endpoint::default() };
    inputs.gateways[0].status.as_mut().expect("a status").active_endpoints.push(endpoint);
    let plan = plan(&build(&inputs), &me(0, 1));
    let kubelet = IpAddr::from([192, 168, 1, 11]);
    let kubelets = |plan: &Plan| plan.interception.clone().expect("a cloud").kubelets.nodes;
    assert_eq!(plan.state.routes[&kubelet.into()].device, Device::Tunnel);
    assert!(!kubelets(&plan).contains_key(&kubelet), "by L3");
    inputs.settings.forward_node_ip = false;
    let plan = super::plan(&build(&inputs), &me(0, 1));
    assert!(kubelets(&plan).contains_key(&kubelet), "by the proxy, over the overlay");
    assert_eq!(plan.state.remote[&kubelet.into()].via, [192, 168, 0, 10]);
}

#[test]
fn member_sends_everything_to_its_gateway_node() {
    let plan = plan(&build(&inputs(&three_pools())), &me(2, 1));
    assert_eq!(plan.role, Role::Member);
    assert!(plan.tunnel.is_none() && plan.state.peers.is_empty());
    assert!(plan.state.remote.values().all(|r| r.via == [192, 168, 2, 10]));
    assert_eq!(plan.state.remote.len(), 8);
    assert_eq!(plan.state.local.len(), 4);
    let overlay = plan.overlay.expect("a member node has the overlay");
    assert_eq!(overlay.mtu, 1450);
    let addresses: Vec<String> = overlay.addresses.iter().map(ToString::to_string).collect();
    assert_eq!(addresses, ["10.2.1.0/32", "fd00:2:1::/128"]);
}

#[test]
fn protected_prefixes_never_enter_the_tunnel() {
    let mut inputs = inputs(&three_pools());
    let status = inputs.gateways[1].status.as_mut().expect("the site has a status");
    status.nodes[1].subnets =
        vec!["172.16.0.0/12".into(), "10.96.0.0/12".into(), "198.51.100.0/24".into(), "10.9.0.0/24".into()];
    let me = Me {
        protected: BTreeSet::from([
            "172.20.0.1/32".parse().expect("a prefix"),
            "10.96.0.0/16".parse().expect("a prefix"),
        ]),
        ..me(0, 1)
    };
    let plan = plan(&build(&inputs), &me);
    let routes: Vec<String> = plan.state.routes.keys().map(ToString::to_string).collect();
    assert!(
        !routes.iter().any(|r| r.starts_with("172.") || r.starts_with("10.96.") || r.starts_with("198.")),
        "{routes:?}"
    );
    assert!(routes.contains(&"10.9.0.0/24".to_owned()), "the unprotected prefix of the same node stays: {routes:?}");
    assert_eq!(
        plan.problems.iter().filter(|p| p.contains("not sent into the tunnel")).count(),
        3,
        "{:?}",
        plan.problems
    );
}

#[test]
fn node_addresses_are_forwarded_except_those_of_the_own_network() {
    let mut inputs = inputs(&three_pools());
    inputs.settings.forward_node_ip = true;
    // The other site uses the same subnet as this one.
    inputs.gateways[2].status.as_mut().expect("a status").nodes[1].private_ip = "192.168.1.77".into();
    let me = Me { subnets: BTreeSet::from(["192.168.1.0/24".parse().expect("a prefix")]), ..me(1, 1) };
    let plan = plan(&build(&inputs), &me);
    let routes: Vec<String> =
        plan.state.routes.keys().map(ToString::to_string).filter(|r| r.starts_with("192.")).collect();
    assert_eq!(routes, ["192.168.0.10/32", "192.168.0.11/32", "192.168.2.10/32"]);
    assert!(plan.problems.iter().any(|p| p.contains("192.168.1.77/32")), "{:?}", plan.problems);
    assert!(
        plan.state.local.contains_key(&"192.168.1.11/32".parse().expect("a prefix")),
        "the own node's address is known to the gateway node"
    );
    assert!(plan.overlay.expect("an overlay").addresses.iter().all(|a| !a.to_string().starts_with("192.")));
}

#[test]
fn pool_that_can_be_dialled_relays_if_none_is_exposed() {
    let mut inputs = inputs(&three_pools());
    inputs.gateways[0].spec.expose_type = ExposeType::Edge;
    for endpoint in &mut inputs.gateways[0].status.as_mut().expect("a status").active_endpoints {
        endpoint.public_ip = Some("198.51.100.1".to_owned());
    }
    let topology = build(&inputs);
    let [relay, edge] = [me(0, 0), me(1, 0)].map(|me| plan(&topology, &me));
    assert!(relay.config.relay);
    assert_eq!(edge.problems, Vec::<String>::new());
    let (_, peer) = edge.state.peers.first_key_value().expect("the relay");
    let other: IpNet = "10.2.0.0/24".parse().expect("a prefix");
    assert!(peer.allowed.contains(&other), "the other edge's prefixes: {:?}", peer.allowed);
    assert!(relay.state.peers.values().all(|peer| peer.endpoint.is_none()), "edges dial");
}

#[test]
fn edge_with_a_public_address_keeps_its_nat_open() {
    let mut inputs = inputs(&three_pools());
    // As OpenYurt's agent wrote it: the address may be that of the site's NAT.
    for endpoint in &mut inputs.gateways[1].status.as_mut().expect("a status").active_endpoints {
        (endpoint.under_nat, endpoint.public_ip) = (false, Some("198.51.100.20".to_owned()));
    }
    let plan = plan(&build(&inputs), &me(1, 0));
    assert!(plan.state.peers.values().any(|peer| peer.endpoint.is_some() && peer.keepalive == Some(15)));
}

#[test]
fn zero_replicas_switch_a_half_off_on_both_sides() {
    let mut inputs = inputs(&three_pools());
    let prefix: IpNet = "10.1.0.0/24".parse().expect("a prefix");
    let routed = |inputs: &Inputs| plan(&build(inputs), &me(0, 1)).state.routes.contains_key(&prefix);
    assert!(routed(&inputs));
    inputs.gateways[1].spec.tunnel_config = Some(TunnelConfig { replicas: 0 });
    assert!(!routed(&inputs), "other pools use their other routes");
    assert_eq!(plan(&build(&inputs), &me(1, 1)).role, Role::None);
    let proxy = Endpoint { node_name: node_name(0, 0), type_: EndpointType::Proxy, ..Endpoint::default() };
    inputs.gateways[0].status.as_mut().expect("a status").active_endpoints.push(proxy);
    let intercepted = |inputs: &Inputs| {
        let interception = plan(&build(inputs), &me(0, 0)).interception.expect("a proxy");
        interception.kubelets.nodes.contains_key(&[192, 168, 1, 10].into())
    };
    assert!(intercepted(&inputs));
    inputs.gateways[1].spec.proxy_config = Some(ProxyConfig { replicas: 0, ..ProxyConfig::default() });
    assert!(!intercepted(&inputs), "its kubelets are dialled the ordinary way");
}

#[test]
fn lan_may_contain_pod_prefixes_but_no_prefix_may_contain_the_lan() {
    let mut inputs = inputs(&three_pools());
    let status = inputs.gateways[1].status.as_mut().expect("a status");
    status.nodes[1].subnets = vec!["10.1.1.0/24".into(), "172.16.0.0/12".into()];
    let lans = ["10.0.0.0/8", "172.16.5.0/24"].map(|lan| lan.parse().expect("a prefix"));
    let wide = plan(&build(&inputs), &Me { subnets: lans.into(), ..me(0, 1) });
    let routed = |plan: &Plan, prefix: &str| plan.state.routes.contains_key(&prefix.parse().expect("a prefix"));
    assert!(routed(&wide, "10.1.1.0/24") && !routed(&wide, "172.16.0.0/12"));
    assert!(wide.problems.iter().any(|p| p.contains("overlaps 172.16.5.0/24")), "{:?}", wide.problems);
    // A part of the LAN that another pool claims is not a mask that is too wide: the LAN's own hosts are there.
    let lan = BTreeSet::from(["10.1.0.0/16".parse().expect("a prefix")]);
    let claimed = plan(&build(&inputs), &Me { subnets: lan, ..me(0, 1) });
    assert!(!routed(&claimed, "10.1.1.0/24"));
    assert!(claimed.problems.iter().any(|p| p.contains("overlaps 10.1.0.0/16")), "{:?}", claimed.problems);
}

#[test]
fn all_addresses_of_a_node_are_forwarded() {
    let mut inputs = inputs(&three_pools());
    inputs.settings.forward_node_ip = true;
    let status = inputs.gateways[1].status.as_mut().expect("a status");
    status.nodes[1].private_ips = vec!["192.168.1.11".to_owned(), "fd10:1::b".to_owned()];
    let own: IpNet = "fd10:1::b/128".parse().expect("a prefix");
    let topology = build(&inputs);
    assert!(plan(&topology, &me(0, 1)).state.routes.contains_key(&own), "reached from another pool");
    let node = plan(&topology, &me(1, 1));
    assert!(node.own_prefixes().contains(&own), "accepted as a source of the node");
    assert!(!node.overlay.expect("an overlay").addresses.contains(&own), "another device has it");
}

#[test]
fn node_address_does_not_exclude_another_pools_prefix() {
    let mut inputs = inputs(&three_pools());
    inputs.settings.forward_node_ip = true;
    // A stolen node of the oldest pool reports an address of a pod of site 2.
    inputs.gateways[0].status.as_mut().expect("a status").nodes[1].private_ip = "10.2.1.7".into();
    let plan = plan(&build(&inputs), &me(1, 1));
    assert!(plan.state.routes.contains_key(&"10.2.1.0/24".parse().expect("a prefix")));
    assert!(plan.problems.iter().any(|p| p.contains("10.2.1.7/32 overlaps 10.2.1.0/24")), "{:?}", plan.problems);
}

#[test]
fn l3_off_plans_nothing_without_problems() {
    let mut inputs = inputs(&three_pools());
    inputs.settings.l3 = false;
    let plan = plan(&build(&inputs), &me(0, 0));
    assert_eq!((plan.role, plan.problems), (Role::None, vec![]));
}

#[test]
fn without_l3_the_overlay_carries_only_kubelet_connections() {
    let mut inputs = inputs(&three_pools());
    let proxy = Endpoint { node_name: node_name(0, 0), type_: EndpointType::Proxy, ..Endpoint::default() };
    inputs.gateways[0].status.as_mut().expect("a status").active_endpoints.push(proxy);
    inputs.settings.l3 = false;
    let topology = build(&inputs);
    let [gateway, member, edge] = [me(0, 0), me(0, 1), me(1, 0)].map(|me| plan(&topology, &me));
    assert_eq!(edge.role, Role::None);
    let interception = gateway.interception.expect("the proxy's node");
    assert!(interception.to == InterceptTo::Here && gateway.state.remote.is_empty());
    let via = gateway.config.node.octets();
    for plan in [&gateway.tunnel, &member.tunnel] {
        assert_eq!(*plan, None);
    }
    assert!(gateway.overlay.is_some() && member.overlay.is_some());
    assert!(member.state.routes.is_empty() && member.state.peers.is_empty(), "{:?}", member.state);
    let kubelets: BTreeSet<IpNet> =
        member.interception.expect("a member node").kubelets.nodes.keys().map(|a| IpNet::from(*a)).collect();
    assert_eq!(member.state.remote.keys().copied().collect::<BTreeSet<_>>(), kubelets);
    assert!(!kubelets.is_empty() && member.state.remote.values().all(|remote| remote.via == via));
}

#[test]
fn stolen_node_with_the_clouds_key_cuts_off_only_itself() {
    let honest = inputs(&three_pools());
    let mut stolen = honest.clone();
    let cloud = stolen.gateway_nodes[0].spec.public_key.clone();
    let stolen_node = stolen
        .gateway_nodes
        .iter_mut()
        .find(|n| n.metadata.name == Some(node_name(1, 0)))
        .expect("an edge's gateway node");
    stolen_node.spec.public_key = cloud.clone();
    // Its site is the oldest.
    let created = |second| {
        Some(k8s_openapi::apimachinery::pkg::apis::meta::v1::Time(
            jiff::Timestamp::from_second(second).expect("a time"),
        ))
    };
    for (n, gateway) in stolen.gateways.iter_mut().enumerate() {
        gateway.metadata.creation_timestamp = created(if n == 1 { 1 } else { 1000 });
    }
    let (before, after) = (build(&honest), build(&stolen));
    assert_eq!(after.pools["site-0"], before.pools["site-0"]);
    assert_eq!(after.pools["site-1"].gateways[&node_name(1, 0)].key, None);
    assert!(
        after.problems.iter().any(|p| p.contains("claims the WireGuard key of node s0-n0")),
        "{:?}",
        after.problems
    );
}

#[test]
fn api_server_address_never_enters_the_tunnel() {
    let mut inputs = inputs(&three_pools());
    inputs.settings.forward_node_ip = true;
    // A kubelet that reports the API server's address as its own.
    inputs.gateways[1].status.as_mut().expect("a status").nodes[1].private_ip = "203.0.113.1".into();
    let server: IpNet = "203.0.113.1/32".parse().expect("a prefix");
    let routes = |inputs: &Inputs| plan(&build(inputs), &me(2, 1)).state.routes;
    assert!(routes(&inputs).contains_key(&server));
    inputs.api_servers = BTreeSet::from([server.addr()]);
    assert!(!routes(&inputs).contains_key(&server));
}

#[test]
fn proxy_apart_from_the_tunnel_node_is_reached_from_its_whole_pool() {
    let mut sites = three_pools();
    sites[0].nodes = 3;
    let mut inputs = inputs(&sites);
    let proxy = Endpoint { node_name: node_name(0, 2), type_: EndpointType::Proxy, ..Endpoint::default() };
    inputs.gateways[0].status.as_mut().expect("a status").active_endpoints.push(proxy);
    let topology = build(&inputs);
    let [tunnel, member, proxy] = [me(0, 0), me(0, 1), me(0, 2)].map(|me| plan(&topology, &me));
    let edge: IpNet = "192.168.1.10/32".parse().expect("a prefix");
    assert_eq!((tunnel.role, proxy.role), (Role::Gateway, Role::Member));
    assert!(
        proxy.interception.expect("intercepts").to == InterceptTo::Here && !proxy.state.remote.contains_key(&edge),
        "what it intercepts it does not forward"
    );
    for plan in [tunnel, member] {
        assert_eq!(plan.state.remote.get(&edge).map(|remote| remote.via), Some(proxy.config.node.octets()));
    }
}

#[test]
fn node_without_pool_gets_the_remedy() {
    let plan = plan(&build(&inputs(&three_pools())), &Me { node: "stranger".into(), ..me(0, 0) });
    assert_eq!(plan.role, Role::None);
    assert_eq!(plan.state, State::default());
    assert!(plan.problems[0].contains("raven.openyurt.io/gateway="), "{:?}", plan.problems);
}

#[test]
fn host_source_is_an_address_inside_the_own_prefix() {
    let topology = build(&inputs(&three_pools()));
    let sources = |addresses: &[&str]| {
        let addresses = addresses.iter().map(|a| a.parse().expect("an address")).collect();
        let plan = plan(&topology, &Me { addresses, ..me(1, 0) });
        let sources: BTreeSet<String> =
            plan.state.routes.values().filter_map(|r| r.source).map(|s| s.to_string()).collect();
        (sources, plan.overlay.expect("an overlay").addresses)
    };
    let (without, own) = sources(&["192.168.1.10", "127.0.0.1"]);
    assert_eq!(without, own.iter().map(|a| a.addr().to_string()).collect());
    let bridge: BTreeSet<String> = own.iter().map(|a| next(a.addr()).to_string()).collect();
    let mut having: Vec<&str> = bridge.iter().map(String::as_str).collect();
    having.extend(["192.168.1.10", "1.1.1.1", "ffff::1"]);
    let ours: Vec<String> = own.iter().map(|a| a.addr().to_string()).collect();
    having.extend(ours.iter().map(String::as_str));
    assert_eq!(sources(&having), (bridge, own), "the overlay's own addresses stay");
}

fn next(address: IpAddr) -> IpAddr {
    match address {
        IpAddr::V4(v4) => Ipv4Addr::from(u32::from(v4) + 1).into(),
        IpAddr::V6(v6) => std::net::Ipv6Addr::from(u128::from(v6) + 1).into(),
    }
}

#[test]
fn edges_without_an_exposed_pool_report_it_and_keep_their_routes() {
    let mut sites = three_pools();
    sites[0].exposed = false;
    let plan = plan(&build(&inputs(&sites)), &me(1, 1));
    assert!(plan.problems.iter().any(|p| p.contains("cannot be reached")), "{:?}", plan.problems);
    assert_eq!(
        plan.state.routes.len(),
        8,
        "the routes stay, so that no packet leaves unencrypted by the default route"
    );
}
