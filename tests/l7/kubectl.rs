//! kubectl reaches a pod at an edge behind NAT: by the node's name and by its address, from an API server on the gateway node and on an
//! ordinary cloud node, with L3 and without.

use raven_tests::{
    Lab, eventually,
    kubectl::{self, POD, SCRIPT},
    kubelet::{Prefer, SecondApiServer},
    privileged,
    proof::Check,
};

use crate::{Running, SOON};

#[tokio::test(flavor = "multi_thread")]
async fn kubectl_reaches_a_pod_at_an_edge_by_name_and_by_address_with_l3_and_without() {
    if !privileged("kubectl_reaches_a_pod_at_an_edge_by_name_and_by_address_with_l3_and_without") {
        return;
    }
    let running = Running::of(Lab::builder()).await.expect("the lab starts");
    let lab = &running.lab;
    let _kubelet = running.check(lab.start_kubelet("x-b").await);
    running.check(lab.run_pod("x-b", POD, SCRIPT).await);

    let server = running.check(lab.api_server_on("cloud-b", Prefer::Hostname).await);
    running.all(&server, "by name, from an ordinary node", 100).await;
    // With the node's DNS and kube-proxy, which the API server brought: `kubectl top`, by way of metrics-server.
    running.top(&server, "by name", Prefer::Hostname).await;
    running.check(server.kill());

    let server = running.check(lab.api_server_on("cloud-a", Prefer::Hostname).await);
    running.all(&server, "by name, from the gateway node", 5).await;
    running.check(server.kill());

    let server = running.check(lab.api_server_on("cloud-a", Prefer::InternalIP).await);
    running.all(&server, "by address, from the gateway node", 10).await;
    // What is taken is visible, and is the kubelet's ports alone.
    let taken = running.check(lab.node("cloud-a").ns.sh("bpftool map dump pinned /sys/fs/bpf/raven/v1/maps/KUBELETS | tr -d ' \\n'"));
    assert!(taken.contains("\"address\":[10,1,0,12],\"port\":10250"), "{taken}");
    let way = |port: u16| lab.node("cloud-a").ns.sh(&format!("ip route get 10.1.0.12 ipproto tcp dport {port}"));
    assert!(running.check(way(10250)).contains("dev lo"), "the kubelet's port ends here");
    assert!(running.check(way(22)).contains("dev eth0"), "other ports are untouched");
    running.check(server.kill());

    let server = running.check(lab.api_server_on("cloud-b", Prefer::InternalIP).await);
    running.all(&server, "by address, from an ordinary node", 10).await;
    running.top(&server, "by address", Prefer::InternalIP).await;
    running.check(server.kill());

    // As Prometheus and metrics-server read them, by address, from a pod of an ordinary node; the kubelet shows its own certificate, and
    // lets in who shows the API server's.
    let file = |name: &str| lab.cluster().file(name).display().to_string();
    let (ca, certificate, key) = (file("ca.crt"), file("kubelet-client.crt"), file("kubelet-client.key"));
    let scrape =
        |more: &str| lab.pod("cloud-b").ns.sh(&format!("curl -sS -m 10 --cacert {ca} {more} https://10.1.0.12:10250/metrics/resource"));
    let metrics = running.check(scrape(&format!("--cert {certificate} --key {key}")));
    assert!(metrics.contains("node_cpu_usage_seconds_total"), "{metrics}");
    assert_eq!(running.check(scrape("")), "Unauthorized", "who shows none");

    // L3 off, everywhere.
    running.check(lab.cluster().put_setting("raven-cfg", "enable-l3-tunnel", "false").await);
    for node in ["cloud-a", "x-a"] {
        let gone = || async {
            let links = lab.node(node).ns.sh("ip -o link")?;
            anyhow::ensure!(!links.contains("raven-wg0"), "{links}");
            Ok(())
        };
        running.check(eventually(SOON, &format!("L3 is off on {node}"), gone).await);
    }
    for (node, prefer, way) in [
        ("cloud-b", Prefer::Hostname, "by name, L3 off"),
        ("cloud-a", Prefer::InternalIP, "by address, from the gateway node, L3 off"),
        ("cloud-b", Prefer::InternalIP, "by address, from an ordinary node, L3 off"),
    ] {
        let server = running.check(lab.api_server_on(node, prefer).await);
        running.all(&server, way, 5).await;
        running.check(server.kill());
    }
}

impl Running {
    /// All that people do, once the way is there: the agents learn of it by themselves, and CoreDNS and kube-proxy were started a moment ago.
    async fn all(&self, server: &SecondApiServer, way: &str, megabytes: usize) {
        self.check(eventually(SOON, &format!("there is a way, {way}"), || async { kubectl::logs(server) }).await);
        report(self, &kubectl::all(server, way, megabytes));
    }

    /// metrics-server on an ordinary cloud node reads the kubelet at the edge, and `kubectl top` tells what it read.
    async fn top(&self, server: &SecondApiServer, way: &str, prefer: Prefer) {
        let mut metrics = self.check(self.lab.start_metrics_server("cloud-b", prefer).await);
        let seen = self.check(self.lab.top_node(server, "x-b").await);
        println!("ok kubectl top node, metrics-server {way}: {seen}");
        self.check(metrics.kill());
    }
}

fn report(running: &Running, checks: &[Check]) {
    for check in checks {
        println!("{} {}: {}", if check.ok { "ok" } else { "FAILED" }, check.name, check.detail);
    }
    let failed: Vec<String> = checks.iter().filter(|c| !c.ok).map(|c| format!("{}: {}", c.name, c.detail)).collect();
    running.check(if failed.is_empty() { Ok(()) } else { Err(anyhow::anyhow!("{}", failed.join("\n"))) });
}
