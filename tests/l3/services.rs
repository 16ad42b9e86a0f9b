//! Tests of other components on a node: kube-proxy's DNAT and masquerade, NetworkPolicy and the CNI's masquerade keep
//! working, and host processes use a source address to which answers can be routed.

use std::{
    net::{IpAddr, Ipv6Addr, SocketAddr},
    time::Duration,
};

use anyhow::{Result, ensure};
use ipnet::IpNet;
use raven_tests::{
    Lab, Masquerade, MasqueradeBy, Namespace, Node, eventually,
    probe::{self, Echo, Flow},
    proof, require_root,
};

use crate::Running;

const SOON: Duration = Duration::from_secs(5);
const PORT: u16 = 8080;

/// Returns the source address that a server observes.
async fn seen(from: &Namespace, to: SocketAddr) -> Result<IpAddr> {
    Ok(probe::tcp_echo(from, to, &[7; 5000], SOON).await?.ip())
}

/// Returns the first address of a node's pod prefix.
fn first_address(lab: &Lab, node: &str) -> IpAddr {
    lab.node(node).pod_cidr_v4().split('/').next().and_then(|a| a.parse().ok()).expect("the podCIDR is a prefix")
}

/// Returns the address of the pods' bridge, the second of the prefix; some kernels cannot use the first
/// one for a connection.
fn bridge(lab: &Lab, node: &str) -> IpAddr {
    let IpAddr::V4(first) = first_address(lab, node) else { panic!("the podCIDR is not IPv4") };
    IpAddr::V4((u32::from(first) + 1).into())
}

/// Returns the prefixes of a node's pods.
fn prefixes(node: &Node) -> [IpNet; 2] {
    [node.pod_cidr_v4(), node.pod_cidr_v6()].map(|prefix| prefix.parse().expect("the podCIDR is a prefix"))
}

#[tokio::test(flavor = "multi_thread")]
async fn services_and_host_processes_reach_other_pools_and_policies_apply() {
    require_root!();
    let running = Running::start().await.expect("start the lab");
    let lab = &running.lab;
    let (client, server, node) = (lab.pod("cloud-b"), lab.pod("y-b"), lab.node("cloud-b"));
    let echo = Echo::on(&server.ns, SocketAddr::from((server.v4, PORT))).expect("start the echo server");
    // The rules of kube-proxy: DNAT of the ClusterIP, mark and masquerade of the NodePort.
    let echo6 = Echo::on(&server.ns, SocketAddr::from((server.v6, PORT))).expect("start the echo server");
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
    assert_eq!(
        running.check(seen(&client.ns, cluster_ip).await),
        IpAddr::V4(client.v4),
        "ClusterIP: source is the pod's address"
    );
    let cluster_ip6 = SocketAddr::from((Ipv6Addr::new(0xfd00, 0x96, 0, 0, 0, 0, 0, 0x50), 80));
    assert_eq!(
        running.check(seen(&client.ns, cluster_ip6).await),
        IpAddr::V6(client.v6),
        "ClusterIP: source is the pod's address"
    );
    let node_port = SocketAddr::from((node.lan_v4, 30080));
    let outside = running.check(seen(&lab.control_plane, node_port).await);
    assert_eq!(outside, first_address(lab, "cloud-b"), "NodePort: source is an address to which answers are routed");
    for host in ["cloud-b", "cloud-a", "x-b", "x-a"] {
        let from = running.check(seen(&lab.node(host).ns, echo.address).await);
        assert_eq!(from, bridge(lab, host), "source of a process of {host}");
        // In the other direction, the pod reaches the host by that address.
        let host = Echo::start(&lab.node(host).ns, from).expect("start the echo server on the host");
        running.check(seen(&server.ns, host.address).await);
    }

    // A policy on the receiver's node applies to the sender's real address.
    let policy = format!(
        "table ip np {{\n chain f {{ type filter hook forward priority 0; ip saddr {} counter drop; }}\n}}\n",
        client.v4
    );
    running.check(lab.node("y-b").ns.nft(&policy));
    assert!(seen(&client.ns, cluster_ip).await.is_err(), "the policy must deny the connection");
    let dropped = running.check(lab.node("y-b").ns.sh("nft list table ip np"));
    assert!(!dropped.contains("packets 0 "), "the policy did not drop the packets: {dropped}");
    // Other clients are not affected. A policy also applies to a NodePort, by its source address.
    running.check(seen(&lab.control_plane, node_port).await);
    let policy = format!(
        "delete table ip np\ntable ip np {{\n chain f {{ type filter hook forward priority 0; ip saddr {outside} counter drop; }}\n}}\n"
    );
    running.check(lab.node("y-b").ns.nft(&policy));
    assert!(seen(&lab.control_plane, node_port).await.is_err(), "the policy must deny the connection");
    let dropped = running.check(lab.node("y-b").ns.sh("nft list table ip np"));
    assert!(!dropped.contains("packets 0 "), "the policy did not drop the packets: {dropped}");
    running.check(seen(&client.ns, cluster_ip).await);
}

#[tokio::test(flavor = "multi_thread")]
async fn node_port_and_cluster_ip_work_on_a_gateway_node() {
    require_root!();
    let running = Running::start().await.expect("start the lab");
    let lab = &running.lab;
    let (server, node) = (lab.pod("y-b"), lab.node("cloud-a"));
    let echo = Echo::on(&server.ns, SocketAddr::from((server.v4, PORT))).expect("start the echo server");
    let echo6 = Echo::on(&server.ns, SocketAddr::from((server.v6, PORT))).expect("start the echo server");
    // The rules of kube-proxy: it marks and masquerades NodePorts, and connections of host processes to ClusterIPs.
    let rules = format!(
        "table ip6 svc {{
            chain out {{ type nat hook output priority -100;
                ip6 daddr fd00:96::50 tcp dport 80 meta mark set meta mark or 0x4000 dnat to {2}; }}
            chain post {{ type nat hook postrouting priority srcnat; meta mark & 0x4000 != 0 masquerade; }}
        }}
        table ip svc {{
            chain pre {{ type nat hook prerouting priority dstnat;
                ip daddr {1} tcp dport 30080 meta mark set meta mark or 0x4000 dnat to {0}; }}
            chain out {{ type nat hook output priority -100;
                ip daddr 10.96.0.50 tcp dport 80 meta mark set meta mark or 0x4000 dnat to {0}; }}
            chain post {{ type nat hook postrouting priority srcnat; meta mark & 0x4000 != 0 masquerade; }}
        }}",
        echo.address, node.lan_v4, echo6.address
    );
    running.check(node.ns.nft(&rules));
    let node_port = SocketAddr::from((node.lan_v4, 30080));
    assert_eq!(running.check(seen(&lab.control_plane, node_port).await), first_address(lab, "cloud-a"), "NodePort");
    let cluster_ip = SocketAddr::from(([10, 96, 0, 50], 80));
    running.check(seen(&node.ns, cluster_ip).await);
    let cluster_ip6 = SocketAddr::from((Ipv6Addr::new(0xfd00, 0x96, 0, 0, 0, 0, 0, 0x50), 80));
    running.check(seen(&node.ns, cluster_ip6).await);

    // Without a mark, as of kube-proxy without --cluster-cidr, and from a process that is bound to the node's address.
    for host in ["cloud-a", "cloud-b"].map(|name| lab.node(name)) {
        let rules = format!(
            "table ip6 plain {{ chain out {{ type nat hook output priority -99;
                ip6 daddr fd00:96::51 tcp dport 80 dnat to {1}; }}
            }}
            table ip plain {{ chain out {{ type nat hook output priority -99;
                ip daddr 10.96.0.51 tcp dport 80 dnat to {0}; }}
            }}",
            echo.address, echo6.address
        );
        running.check(host.ns.nft(&rules));
        let own = |address: IpAddr| prefixes(host).iter().any(|prefix| prefix.contains(&address));
        let unmarked = SocketAddr::from(([10, 96, 0, 51], 80));
        assert!(own(running.check(seen(&host.ns, unmarked).await)), "IPv4 from {}", host.name);
        let unmarked = SocketAddr::from((Ipv6Addr::new(0xfd00, 0x96, 0, 0, 0, 0, 0, 0x51), 80));
        assert!(own(running.check(seen(&host.ns, unmarked).await)), "IPv6 from {}", host.name);
        for (source, to) in
            [(host.lan_v4.to_string(), server.v4.into()), (host.lan_v6.to_string(), IpAddr::from(server.v6))]
        {
            let answer = running.check(probe::ping_with(&host.ns, to, &["-I", &source]).await);
            assert!(answer.is_some(), "{to} does not answer {source} of {}", host.name);
        }
    }
}

/// Fails unless there are UDP connections from `pod`, and all of them have another source (`changed`) or none.
fn sources_are(node: &Namespace, pod: IpAddr, changed: bool) -> Result<()> {
    let family = if pod.is_ipv4() { "ipv4" } else { "ipv6" };
    let entries = node.sh(&format!("conntrack -L -f {family} -p udp --orig-src {pod} 2>/dev/null"))?;
    // A line has the addresses of both directions: the second dst= is where answers go.
    let answered: Vec<_> = entries.lines().filter_map(|line| line.split("dst=").nth(2)?.split(' ').next()).collect();
    ensure!(!answered.is_empty() && answered.iter().all(|to| (*to != pod.to_string()) == changed), "{entries}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn connections_from_before_the_exemption_get_their_pods_source() {
    require_root!();
    let lab = Lab::builder().masquerade(Masquerade::Never, MasqueradeBy::Nftables).up().await.expect("start the lab");
    let (from, to) = (lab.pod("x-b").clone(), lab.pod("cloud-b").clone());
    let node = lab.node("x-b").clone();
    // A CNI that writes SNAT. The kernel keeps its entries when the route changes.
    let [v4, v6] = prefixes(&node);
    let rules = format!(
        "table inet cni {{ chain post {{ type nat hook postrouting priority srcnat;
            ip saddr {v4} ip daddr != {v4} snat ip to {}
            ip6 saddr {v6} ip6 daddr != {v6} snat ip6 to {}; }}
        }}",
        node.lan_v4, node.lan_v6
    );
    node.ns.nft(&rules).expect("load the rules");
    let pairs = [(IpAddr::from(from.v4), IpAddr::from(to.v4)), (from.v6.into(), to.v6.into())];
    let start = || pairs.map(|(_, to_address)| Flow::start(&from.ns, &to.ns, to_address, 100).expect("start a flow"));
    let until = async |changed: bool| {
        for (pod, _) in pairs {
            let what = format!("the source of {pod} is changed: {changed}");
            eventually(SOON, &what, || async { sources_are(&node.ns, pod, changed) }).await?;
        }
        anyhow::Ok(())
    };
    let early = start();
    until(true).await.expect("the CNI changes the source");
    let running = Running::begin(lab).await.expect("start Raven");
    running.check(proof::converged(&running.lab).await.map(drop));
    running.check(until(false).await);
    for flow in early {
        let report = running.check(flow.stop().await);
        assert!(report.received > 0, "the flow keeps its source: {report:?}");
    }
    running.check(node.ns.sh("nft delete table inet raven; conntrack -F"));
    let late = start();
    running.check(until(true).await);
    // A change that wakes the agent at once.
    running.check(node.ns.sh("ip rule del pref 100"));
    running.check(until(false).await);
    // A further run leaves a complete table as it is: the handles of its rules stay.
    let table = || node.ns.sh("nft -a list table inet raven; ip rule show pref 100");
    let complete = running.check(table());
    running.check(node.ns.sh("ip rule del pref 100"));
    let restored = || async {
        let now = table()?;
        ensure!(now == complete, "{now}");
        Ok(())
    };
    running.check(eventually(SOON, "the rule is restored, and the table unchanged", restored).await);
    for flow in late {
        running.check(flow.stop().await);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn traffic_between_pools_is_exempt_from_masquerade() {
    require_root!();
    for by in MasqueradeBy::all() {
        let builder = Lab::builder().masquerade(Masquerade::BeyondPool, by);
        let running = Running::of(builder).await.expect("start the lab");
        let result = async {
            for (a, b) in proof::pairs(&running.lab) {
                for family in 0..2 {
                    proof::reach(&running.lab, &a, &b, family).await?;
                }
            }
            // The CNI's rule still exists and applies to traffic that leaves the cluster.
            let list =
                if by == MasqueradeBy::IptablesLegacy { "iptables-legacy-save -t nat" } else { "nft list ruleset" };
            let rules = running.lab.node("x-b").ns.sh(list)?;
            ensure!(rules.to_lowercase().contains("masquerade"), "the CNI's masquerade rule is missing: {rules}");
            Ok(())
        };
        running.check(result.await);
    }
}
