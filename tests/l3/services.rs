//! What stands around Raven on a node goes on working: kube-proxy's DNAT and masquerade, NetworkPolicy, the CNI's masquerade
//! in either backend; and host processes have an address that answers come back to.

use std::{
    net::{IpAddr, Ipv6Addr, SocketAddr},
    time::Duration,
};

use anyhow::{Result, ensure};
use raven_tests::{
    Lab, Masquerade, MasqueradeBy, Namespace, privileged,
    probe::{self, Echo},
    proof,
};

use crate::Running;

const SOON: Duration = Duration::from_secs(5);
const PORT: u16 = 8080;

/// The source that a server on the pod of y-b sees.
async fn seen(from: &Namespace, to: SocketAddr) -> Result<IpAddr> {
    Ok(probe::tcp_echo(from, to, &[7; 5000], SOON).await?.ip())
}

/// The address of a node inside its own pod prefix.
fn own_address(lab: &Lab, node: &str) -> IpAddr {
    lab.node(node).pod_cidr_v4().split('/').next().and_then(|a| a.parse().ok()).expect("a podCIDR is a prefix")
}

/// The address of a node's bridge of pods: in its prefix, and not the first, which is none for a connection on every kernel.
fn bridge(lab: &Lab, node: &str) -> IpAddr {
    let IpAddr::V4(first) = own_address(lab, node) else { panic!("an IPv4 prefix") };
    IpAddr::V4((u32::from(first) + 1).into())
}

#[tokio::test(flavor = "multi_thread")]
async fn services_node_ports_and_host_processes_reach_pods_of_other_pools_and_policies_hold() {
    if !privileged("services_node_ports_and_host_processes_reach_pods_of_other_pools_and_policies_hold") {
        return;
    }
    let running = Running::start().await.expect("the lab starts");
    let lab = &running.lab;
    let (client, server, node) = (lab.pod("cloud-b"), lab.pod("y-b"), lab.node("cloud-b"));
    let echo = Echo::on(&server.ns, SocketAddr::from((server.v4, PORT))).expect("the server starts");
    // As kube-proxy has it: DNAT of the ClusterIP, mark and masquerade of the NodePort.
    let echo6 = Echo::on(&server.ns, SocketAddr::from((server.v6, PORT))).expect("the server starts");
    let rules = format!(
        "table ip6 svc {{
            chain pre {{ type nat hook prerouting priority dstnat; ip6 daddr fd00:96::50 tcp dport 80 dnat to {2}; }}
        }}
        table ip svc {{
            chain pre {{ type nat hook prerouting priority dstnat;
                ip daddr 10.96.0.50 tcp dport 80 dnat to {0}
                ip daddr {1} tcp dport 30080 meta mark set meta mark or 0x4000 dnat to {0}; }}
            chain post {{ type nat hook postrouting priority srcnat; meta mark & 0x4000 != 0 masquerade; }}
        }}",
        echo.address, node.lan_v4, echo6.address
    );
    running.check(node.ns.nft(&rules));

    let cluster_ip = SocketAddr::from(([10, 96, 0, 50], 80));
    assert_eq!(running.check(seen(&client.ns, cluster_ip).await), IpAddr::V4(client.v4), "ClusterIP: the pod's own address");
    let cluster_ip6 = SocketAddr::from((Ipv6Addr::new(0xfd00, 0x96, 0, 0, 0, 0, 0, 0x50), 80));
    assert_eq!(running.check(seen(&client.ns, cluster_ip6).await), IpAddr::V6(client.v6), "ClusterIP: the pod's own address");
    let node_port = SocketAddr::from((node.lan_v4, 30080));
    let outside = running.check(seen(&lab.control_plane, node_port).await);
    assert_eq!(outside, own_address(lab, "cloud-b"), "NodePort: an address that the answer comes back to");
    for host in ["cloud-b", "cloud-a", "x-b", "x-a"] {
        let from = running.check(seen(&lab.node(host).ns, echo.address).await);
        assert_eq!(from, bridge(lab, host), "a process of {host} itself");
        // And back: the pod reaches the host by that address.
        let host = Echo::start(&lab.node(host).ns, from).expect("the server on the host starts");
        running.check(seen(&server.ns, host.address).await);
    }

    // A policy at the receiver holds, by the sender's real address.
    let policy = format!("table ip np {{\n chain f {{ type filter hook forward priority 0; ip saddr {} counter drop; }}\n}}\n", client.v4);
    running.check(lab.node("y-b").ns.nft(&policy));
    assert!(seen(&client.ns, cluster_ip).await.is_err(), "the policy forbids it");
    let dropped = running.check(lab.node("y-b").ns.sh("nft list table ip np"));
    assert!(!dropped.contains("packets 0 "), "it was the policy that dropped it: {dropped}");
    // Of whom it says nothing still gets through; and it holds for a NodePort, by the address that this comes from.
    running.check(seen(&lab.control_plane, node_port).await);
    let policy = format!(
        "delete table ip np\ntable ip np {{\n chain f {{ type filter hook forward priority 0; ip saddr {outside} counter drop; }}\n}}\n"
    );
    running.check(lab.node("y-b").ns.nft(&policy));
    assert!(seen(&lab.control_plane, node_port).await.is_err(), "the policy forbids it");
    let dropped = running.check(lab.node("y-b").ns.sh("nft list table ip np"));
    assert!(!dropped.contains("packets 0 "), "it was the policy that dropped it: {dropped}");
    running.check(seen(&client.ns, cluster_ip).await);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_cnis_masquerade_is_kept_off_whoever_makes_it() {
    if !privileged("the_cnis_masquerade_is_kept_off_whoever_makes_it") {
        return;
    }
    for by in MasqueradeBy::all() {
        let builder = Lab::builder().masquerade(Masquerade::BeyondPool, by);
        let running = Running::of(builder).await.expect("the lab starts");
        let result = async {
            for (a, b) in proof::pairs(&running.lab) {
                for family in 0..2 {
                    proof::reach(&running.lab, &a, &b, family).await?;
                }
            }
            // The rule is there, where it should be, and does its work for what leaves the cluster.
            let list = if by == MasqueradeBy::IptablesLegacy { "iptables-legacy-save -t nat" } else { "nft list ruleset" };
            let rules = running.lab.node("x-b").ns.sh(list)?;
            ensure!(rules.to_lowercase().contains("masquerade"), "the CNI masquerades nothing: {rules}");
            Ok(())
        };
        running.check(result.await);
    }
}
