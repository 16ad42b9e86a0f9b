//! The address family of a pool, and nodes without an address of it.

use raven_api::gateway::EndpointType;

use super::build::*;
use super::cases::two_pools;

#[test]
fn listed_node_without_an_address_is_refused() {
    let mut bare = member("edge", "e1", "10.2.1.0/24");
    bare.address = None;
    let cluster =
        two_pools().gateway(listing(gateway("edge", 2), EndpointType::Tunnel, &["e1", "e2"])).node(bare).apply(1);
    assert_eq!(cluster.tunnel("edge"), ["e2"]);
    cluster.assert_condition(
        "edge",
        "Accepted",
        "False",
        "EndpointNodeUnaddressed",
        "endpoint names node e1, which cannot be elected: it has no IPv4 InternalIP",
    );
}

#[test]
fn node_without_the_pools_address_family_is_ignored_and_reported() {
    for address in [None, Some("2001:db8::1".parse().expect("an address"))] {
        let mut bare = member("edge", "e1", "10.2.1.0/24");
        bare.address = address;
        let cluster = two_pools().node(bare).apply(1);
        assert_eq!((cluster.nodes("edge"), cluster.tunnel("edge")), (vec!["e2".to_owned()], vec!["e2".to_owned()]));
        cluster.assert_condition("edge", "Ready", "True", "Degraded", "without an IPv4 InternalIP are ignored: e1");
        let cluster = cluster.without_node("e2").apply(2);
        match address {
            None => cluster.assert_condition("edge", "Ready", "False", "NoNodeAddress", "--node-ip of the kubelets"),
            Some(_) => assert_eq!(cluster.tunnel("edge"), ["e1"], "a pool with IPv6 only"),
        }
    }
}

#[test]
fn new_pool_takes_the_majority_address_family_and_keeps_it() {
    let ipv6 = |n: u8| format!("fd10::{n}").parse::<std::net::IpAddr>().expect("an address");
    let mut dual = member("edge", "e1", "10.2.1.0/24");
    let ipv4 = dual.address.expect("an address").to_string();
    dual.other_addresses = vec![ipv6(1)];
    let only = |name: &str, n| {
        let mut node = member("edge", name, &format!("10.2.{n}.0/24"));
        node.address = Some(ipv6(n));
        node
    };
    let pool = || two_pools().node(dual.clone()).node(only("e2", 2));
    let cluster = pool().apply(1);
    assert_eq!(cluster.addresses("edge"), std::slice::from_ref(&ipv4), "one of two");
    let cluster = cluster.node(only("e3", 3)).apply(2);
    assert_eq!(cluster.addresses("edge"), [ipv4], "a change would stop the pool");
    let cluster = pool().node(only("e3", 3)).apply(1);
    assert_eq!(cluster.addresses("edge"), ["fd10::1", "fd10::2", "fd10::3"], "two of three have only IPv6");
    let mut without = dual.clone();
    without.other_addresses.clear();
    let cluster = cluster.node(without).without_node("e3").apply(2);
    assert_eq!(cluster.addresses("edge"), ["fd10::2"], "still IPv6");
}
