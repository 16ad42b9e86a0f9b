//! Tests of a pool whose nodes have only IPv6 addresses.

use std::{collections::BTreeMap, net::IpAddr, time::Duration};

use anyhow::Context;
use kube::{Api, api::ListParams};
use raven_api::Gateway;
use raven_common::Verdict;
use raven_tests::{Lab, PoolSpec, eventually, probe, proof, require_root};

use crate::{Running, forged};

/// Starts a lab in which the nodes of some pools have only IPv6 addresses.
async fn start(ipv6_only: &[&str]) -> Running {
    Running::of(Lab::builder().pools(PoolSpec::three_with_ipv6_only(ipv6_only))).await.expect("start the lab")
}

#[tokio::test(flavor = "multi_thread")]
async fn ipv6_pools_are_connected_through_an_ipv6_cloud() {
    require_root!();
    let running = start(&["cloud", "edge-x", "edge-y"]).await;
    for (a, b) in proof::pairs(&running.lab) {
        for family in 0..proof::FAMILIES.len() {
            running.check(proof::reach(&running.lab, &a, &b, family).await);
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn pool_with_ipv6_only_is_connected_in_both_families() {
    require_root!();
    let running = start(&["edge-x"]).await;
    let lab = &running.lab;
    let before = running.check(proof::all_counters(lab));
    for (a, b) in proof::pairs(lab) {
        for family in 0..proof::FAMILIES.len() {
            running.check(proof::reach(lab, &a, &b, family).await);
        }
    }
    // Aggregates too, whose outer UDP checksum the kernel computes per segment.
    for (from, to) in [("x-b", "cloud-b"), ("y-b", "x-b")] {
        running.check(proof::bulk(lab, from, to, 0, 20_000_000).await);
        running.check(proof::bulk(lab, from, to, 1, 20_000_000).await);
    }
    running.check(proof::unfragmented(lab, 5_000_000).await);
    running.check(proof::no_drops(lab, &before));
    let gateway = lab.node("x-a");
    let after = running.check(proof::counters(gateway));
    for verdict in [Verdict::ToTunnel, Verdict::ToOverlayKey] {
        let packets = proof::increase(&before[&gateway.name], &after, verdict);
        assert!(packets > 1000, "{packets} packets: {}", verdict.as_str());
    }
    let overlay = running.check(gateway.ns.run("ip", &["link", "show", "raven0"]));
    assert!(overlay.contains("mtu 1430"), "an outer IPv6 header is 20 bytes longer: {overlay}");
    let gateways: Api<Gateway> = Api::all(lab.cluster().client());
    let listed = running.check(gateways.list(&ListParams::default()).await.map_err(Into::into));
    for gateway in listed {
        let status = gateway.status.clone().unwrap_or_default();
        let reasons: BTreeMap<&str, &str> =
            status.conditions.iter().map(|c| (c.type_.as_str(), c.reason.as_str())).collect();
        assert_eq!(reasons["Ready"], "Ready", "{:?}: {:?}", gateway.metadata.name, status.conditions);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn node_addresses_of_a_pool_with_ipv6_only_are_forwarded() {
    require_root!();
    let running = start(&["edge-x"]).await;
    let lab = &running.lab;
    running.check(lab.cluster().put_setting("raven-agent-config", "forward-node-ip", "true").await);
    for (from, to) in [("cloud-b", "x-b"), ("x-b", "cloud-b"), ("y-b", "x-a"), ("x-a", "y-b")] {
        let target = IpAddr::from(lab.node(to).lan_v6);
        let answers = || async { probe::ping(&lab.node(from).ns, target).await?.context("no answer") };
        running.check(eventually(Duration::from_secs(30), &format!("{target} answers {from}"), answers).await);
    }
    // The nodes of the pool still reach each other on their LAN.
    let route = running.check(lab.node("x-b").ns.run("ip", &["-6", "route", "get", "fd10:1::11"]));
    assert!(route.contains("dev eth0"), "{route}");
}

#[tokio::test(flavor = "multi_thread")]
async fn forged_packets_are_dropped_in_a_pool_with_ipv6_only() {
    require_root!();
    let running = start(&["edge-x"]).await;
    let seen = proof::forged(&running.lab, true).await;
    println!("forged: {}", running.check(seen));
    forged::pods_cannot_send(&running);
}
