//! Tests of [`exposure`](crate::gateway::exposure).

use raven_api::gateway::{Endpoint, EndpointType, ExposeType};
use raven_api::names::LABEL_EDGE_WORKER;

use super::build::*;
use crate::gateway::facts::NodeFacts;

#[test]
fn gateways_without_expose_type_are_exposed_if_they_are_in_the_cloud_and_not_under_nat() {
    let listed = |name: &str, at, node: &str, under_nat| {
        let mut gateway = gateway(name, at);
        gateway.spec.endpoints = vec![Endpoint { node_name: node.to_owned(), under_nat, ..Endpoint::default() }];
        gateway
    };
    let on_edge = |mut node: NodeFacts| {
        node.labels.insert(LABEL_EDGE_WORKER.to_owned(), "true".to_owned());
        node
    };
    let of_v1alpha1 = || {
        Cluster::new()
            .gateway(listed("cloud", 1, "c1", false))
            .gateway(listed("edge", 2, "e1", true))
            .gateway(listed("careless", 3, "f1", false))
            .node(member("cloud", "c1", "10.1.1.0/24"))
            .node(on_edge(member("edge", "e1", "10.2.1.0/24")))
            .node(on_edge(member("careless", "f1", "10.3.1.0/24")))
    };
    let exposed = |cluster: &Cluster| ["cloud", "edge", "careless"].map(|name| cluster.resource(name).is_exposed());
    let cluster = of_v1alpha1().apply(1);
    assert_eq!(exposed(&cluster), [true, false, false], "an edge may have left underNAT out");
    cluster.assert_condition("cloud", "Ready", "True", "Ready", "on all of them at once (cloud)");
    cluster.assert_condition("edge", "Ready", "True", "Ready", "in the pool");
    let declared = of_v1alpha1().gateway(super::build::exposed(gateway("other", 4))).apply(1);
    assert_eq!(exposed(&declared), [false; 3], "a person decides which ones are exposed");
    let unlabelled =
        Cluster::new().gateway(listed("cloud", 1, "c1", false)).node(member("cloud", "c1", "10.1.1.0/24")).apply(1);
    assert!(!unlabelled.resource("cloud").is_exposed(), "it may be a site behind NAT");
    let behind_nat = of_v1alpha1().gateway(listed("cloud", 1, "c1", true)).apply(1);
    assert_eq!(exposed(&behind_nat), [false; 3]);
}

#[test]
fn edge_with_an_address_is_dialled_only_if_no_pool_can_relay() {
    let with = |cloud: raven_api::Gateway| {
        let mut edge = listing(gateway("edge", 2), EndpointType::Tunnel, &["e1"]);
        edge.spec.endpoints[0].public_ip = Some("198.51.100.7".to_owned());
        let nodes = [member("cloud", "c1", "10.1.1.0/24"), member("edge", "e1", "10.2.1.0/24")];
        nodes.into_iter().fold(Cluster::new().gateway(cloud).gateway(edge), Cluster::node).apply(1)
    };
    let dialled = |cluster: &Cluster, gateway: &str| !cluster.active(gateway)[0].under_nat;
    let relayed = with(exposed(gateway("cloud", 1)));
    assert_eq!((dialled(&relayed, "cloud"), dialled(&relayed, "edge")), (true, false));
    assert_eq!(relayed.active("edge")[0].public_ip.as_deref(), Some("198.51.100.7"), "it stays a protected address");
    assert!(dialled(&with(gateway("cloud", 1)), "edge"), "no pool is exposed");
    let mut without_address = exposed(gateway("cloud", 1));
    without_address.spec.expose_type = ExposeType::LoadBalancer;
    assert!(dialled(&with(without_address), "edge"), "the load balancer has no address yet");
}
