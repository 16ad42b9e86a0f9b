//! Properties of [`decide`](crate::gateway::decide) for arbitrary clusters.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use ipnet::IpNet;
use proptest::prelude::*;
use raven_api::gateway::{EndpointType, Gateway, TunnelConfig};

use super::build::*;
use crate::gateway::Decisions;
use crate::gateway::facts::{NodeFacts, parse_prefix};

// Few names and prefixes, so that collisions are frequent.
fn a_node() -> impl Strategy<Value = NodeFacts> {
    let label = prop_oneof![Just(None), (0..4u8).prop_map(|g| Some(format!("g{g}")))];
    let cidrs = prop::collection::vec((0..4u8, 14..26u8), 0..3);
    (0..8u8, label, prop::option::of(0..2u8), cidrs, any::<bool>(), any::<bool>(), prop::option::of(0..3u8)).prop_map(
        |(name, label, site, cidrs, ready, is_edge, pool)| {
            let mut node = node(&format!("n{name}"), "10.0.0.0/24");
            node.pod_cidrs = cidrs.iter().map(|(third, len)| parse_prefix(&format!("10.0.{third}.0/{len}"))).collect();
            node.ready = ready;
            if let Some(label) = label {
                node = labelled(node, raven_api::LABEL_GATEWAY, &label);
            }
            if let Some(site) = site {
                node = labelled(node, "site", &site.to_string());
            }
            if let Some(pool) = pool {
                node = labelled(node, raven_api::LABEL_NODE_POOL, &format!("p{pool}"));
            }
            if is_edge { edge(node) } else { node }
        },
    )
}

fn a_gateway() -> impl Strategy<Value = Gateway> {
    let endpoints = prop::collection::vec((0..9u8, any::<bool>()), 0..3);
    let extra = prop::option::of((0..4u8, 8..26u8));
    (0..4u8, 0..3i64, prop::option::of(0..2u8), endpoints, 0..3i32, any::<bool>(), extra, any::<bool>()).prop_map(
        |(name, age, site, endpoints, replicas, is_exposed, extra, ruled)| {
            let mut generated = gateway(&format!("g{name}"), age);
            if let Some(site) = site {
                generated = selecting(generated, "site", &site.to_string());
            }
            for (node, tunnel) in endpoints {
                let type_ = if tunnel { EndpointType::Tunnel } else { EndpointType::Proxy };
                generated = listing(generated, type_, &[&format!("n{node}")]);
            }
            if let Some((third, len)) = extra {
                generated = annotated(generated, &format!("10.0.{third}.0/{len}"));
            }
            generated.spec.tunnel_config = Some(TunnelConfig { replicas });
            let generated = if is_exposed { exposed(generated) } else { generated };
            if ruled { by_rule(generated) } else { generated }
        },
    )
}

type Parts = (Vec<Gateway>, Vec<NodeFacts>, Vec<(u8, bool)>, bool);

fn parts() -> impl Strategy<Value = Parts> {
    (
        prop::collection::vec(a_gateway(), 0..5),
        prop::collection::vec(a_node(), 0..9),
        prop::collection::vec((0..3u8, any::<bool>()), 0..2),
        any::<bool>(),
    )
}

// Names are unique in a cluster: the first object of a name counts, so reversing the lists does not change the cluster.
fn cluster((gateways, nodes, pools, rules): &Parts, reversed: bool) -> Cluster {
    let mut cluster = if *rules { Cluster::with_rules() } else { Cluster::new() };
    let by_name: BTreeMap<_, _> = gateways.iter().rev().map(|g| (g.metadata.name.clone(), g)).collect();
    let nodes: BTreeMap<_, _> = nodes.iter().rev().map(|n| (&n.name, n)).collect();
    let mut gateways: Vec<&Gateway> = by_name.into_values().collect();
    let mut nodes: Vec<&NodeFacts> = nodes.into_values().collect();
    if reversed {
        gateways.reverse();
        nodes.reverse();
    }
    for gateway in gateways {
        cluster = cluster.gateway(gateway.clone());
    }
    for node in nodes {
        cluster = cluster.node(node.clone());
    }
    for (pool, is_edge) in pools {
        cluster = cluster.pool(&format!("p{pool}"), *is_edge);
    }
    cluster
}

fn prefixes(decisions: &Decisions) -> Vec<(&str, IpNet)> {
    let nodes = decisions.gateways.iter().flat_map(|(name, d)| d.nodes.iter().map(|n| (name.as_str(), n)));
    nodes
        .flat_map(|(gateway, node)| {
            node.subnets.iter().map(move |s| (gateway, s.parse().expect("a prefix from a status")))
        })
        .collect()
}

proptest! {
    #[test]
    fn decisions_do_not_depend_on_order(parts in parts()) {
        prop_assert_eq!(cluster(&parts, false).decide(), cluster(&parts, true).decide());
    }

    #[test]
    fn no_prefix_is_in_two_gateways(parts in parts()) {
        let decisions = cluster(&parts, false).apply(1).decide();
        let all = prefixes(&decisions);
        for (i, (gateway, prefix)) in all.iter().enumerate() {
            for (other, another) in &all[i + 1..] {
                let overlap = prefix.contains(another) || another.contains(prefix);
                prop_assert!(gateway == other || !overlap, "{prefix} of {gateway} and {another} of {other}");
                prop_assert!(prefix != another, "{prefix} twice in {gateway}");
            }
        }
    }

    #[test]
    fn protected_prefixes_are_in_no_status(parts in parts(), service in (0..4u8, 8..26u8), api in 0..4u8) {
        let mut cluster = cluster(&parts, false);
        let service = parse_prefix(&format!("10.0.{}.0/{}", service.0, service.1)).expect("a prefix");
        let api: IpAddr = [10, 0, api, 9].into();
        cluster.0.services = [service].into();
        cluster.0.api_servers = [api].into();
        for (gateway, prefix) in prefixes(&cluster.apply(1).decide()) {
            prop_assert!(!prefix.contains(&api), "{prefix} of {gateway} has {api} in it");
            prop_assert!(!prefix.contains(&service) && !service.contains(&prefix), "{prefix} of {gateway} and {service}");
        }
    }

    #[test]
    fn no_node_is_in_two_gateways(parts in parts()) {
        let decisions = cluster(&parts, false).apply(1).decide();
        let mut seen = BTreeSet::new();
        for node in decisions.gateways.values().flat_map(|d| &d.nodes) {
            prop_assert!(seen.insert(&node.node_name), "{} twice", node.node_name);
        }
    }

    #[test]
    fn elected_nodes_are_ready_nodes_of_their_pool_within_the_replica_limit(parts in parts()) {
        let cluster = cluster(&parts, false);
        for (name, decision) in &cluster.decide().gateways {
            let tunnels = decision.active_endpoints.iter().filter(|e| e.type_ == EndpointType::Tunnel).count();
            prop_assert!(tunnels <= cluster.resource(name.as_str()).tunnel_replicas());
            for endpoint in &decision.active_endpoints {
                prop_assert!(decision.nodes.iter().any(|n| n.node_name == endpoint.node_name));
                prop_assert!(cluster.0.nodes[&endpoint.node_name.as_str().into()].ready);
            }
        }
    }

    #[test]
    fn pools_without_ready_nodes_keep_their_elected_nodes(parts in parts(), back in 0..9usize) {
        let before = cluster(&parts, false).apply(1).apply(2);
        let mut dark = before.clone();
        for node in before.0.nodes.values() {
            dark = dark.node(down(node.as_ref().clone()));
        }
        let dark = dark.apply(3);
        for name in before.0.gateways.keys() {
            prop_assert_eq!(before.active(name.as_str()), dark.active(name.as_str()));
        }
        // One node recovers: where it can be elected it replaces all kept nodes; other Gateways are unchanged.
        let Some(back) = dark.0.nodes.values().nth(back).cloned() else { return Ok(()) };
        let mut light = back.as_ref().clone();
        light.ready = true;
        let light = dark.clone().node(light).apply(4);
        for name in dark.0.gateways.keys() {
            for type_ in [EndpointType::Tunnel, EndpointType::Proxy] {
                let now = light.elected(name.as_str(), type_);
                let alone = now == [back.name.to_string()];
                prop_assert!(alone || now == dark.elected(name.as_str(), type_), "{name}: {now:?}");
            }
        }
    }

    #[test]
    fn decisions_converge(parts in parts()) {
        // Two runs: the first creates the Gateways of the rules, the second fills them.
        let settled = cluster(&parts, false).apply(1).apply(2);
        prop_assert_eq!(&settled.clone().apply(3).0, &settled.0);
    }

    #[test]
    fn decisions_converge_for_any_link_reports(
        parts in parts(),
        reports in prop::collection::vec((0..8u8, prop::option::of(any::<bool>()), prop::option::of(any::<bool>())), 0..8),
    ) {
        let mut cluster = cluster(&parts, false).apply(1).apply(2);
        for (node, tunnel, proxy) in reports {
            cluster = cluster.link(&format!("n{node}"), tunnel, proxy);
        }
        // A site whose election changes may count as connected for the next site: of four sites, the last one changes
        // in the fourth run.
        let settled = (3..8).fold(cluster, Cluster::apply);
        prop_assert_eq!(&settled.clone().apply(8).0, &settled.0);
    }

    #[test]
    fn elected_nodes_stay_when_a_node_joins(parts in parts(), joining in a_node()) {
        let mut before = cluster(&parts, false).apply(1).apply(2);
        // Rules off: a node that joins may cause the deletion of a rule's Gateway.
        before.0.rules = false;
        let before = before.apply(3);
        prop_assume!(!before.0.nodes.contains_key(&joining.name));
        let after = before.clone().node(joining).apply(4);
        for name in before.0.gateways.keys() {
            let stayed = after.tunnel(name.as_str());
            for node in before.tunnel(name.as_str()) {
                prop_assert!(stayed.contains(&node), "{node} of {name} was replaced by {stayed:?}");
            }
        }
    }

    #[test]
    fn conditions_have_reason_and_message(parts in parts()) {
        for decision in cluster(&parts, false).decide().gateways.values() {
            prop_assert_eq!(decision.verdicts.len(), 3);
            for verdict in &decision.verdicts {
                prop_assert!(!verdict.message.is_empty() && !verdict.reason.is_empty());
            }
        }
    }
}
