//! Tests of `forward-node-ip`: nodes of different pools reach each other by their own addresses.

use std::{net::IpAddr, time::Duration};

use anyhow::Context;
use raven_tests::{eventually, probe, require_root};

use crate::Running;

#[tokio::test(flavor = "multi_thread")]
async fn node_addresses_are_forwarded_only_if_enabled() {
    require_root!();
    let running = Running::start().await.expect("start the lab");
    let lab = &running.lab;
    // From a node and from a pod, to a member and to a gateway node, in both directions, and from edge to edge.
    let pairs = [
        (&lab.node("cloud-b").ns, "x-b"),
        (&lab.pod("cloud-b").ns, "x-a"),
        (&lab.node("x-b").ns, "cloud-b"),
        (&lab.pod("x-b").ns, "y-b"),
    ];
    let both = |node: &str| [IpAddr::from(lab.node(node).lan_v4), lab.node(node).lan_v6.into()];
    let pairs = || pairs.into_iter().flat_map(|(from, node)| both(node).map(|to| (from, to)));
    for (from, to) in pairs() {
        let answer = running.check(probe::ping(from, to).await);
        assert_eq!(answer, None, "{to} from {}, before", from.name);
    }
    running.check(lab.cluster().put_setting("raven-agent-config", "forward-node-ip", "true").await);
    for (from, to) in pairs() {
        let answers = || async { probe::ping(from, to).await?.context("no answer") };
        running.check(eventually(Duration::from_secs(30), &format!("{to} answers {}", from.name), answers).await);
    }
    // Routes within the node's own networks are unchanged: to the API server, a node of the pool,
    // and the tunnel's endpoint.
    for (node, address) in
        [("cloud-b", "10.0.0.5"), ("cloud-b", "10.0.0.11"), ("x-b", "10.1.0.11"), ("x-a", "198.51.100.10")]
    {
        let route = running.check(lab.node(node).ns.run("ip", &["route", "get", address]));
        assert!(route.contains("dev eth0"), "{node} to {address}: {route}");
    }
}
