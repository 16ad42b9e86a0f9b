//! Tests of kubectl with a pod at an edge behind NAT: by node name and by node address, from an API server on the
//! gateway node and on a member of the cloud pool, with and without L3.

use raven_tests::{
    Lab, PoolSpec, eventually,
    kubectl::{self, POD, SCRIPT},
    kubelet::{Prefer, SecondApiServer},
    proof::Check,
    require_root,
};

use crate::{Running, SOON};

#[tokio::test(flavor = "multi_thread")]
async fn kubectl_reaches_pods_of_a_site_with_ipv6_only() {
    require_root!();
    let pools = PoolSpec::three_with_ipv6_only(&["edge-x"]);
    let running = Running::of(Lab::builder().pools(pools)).await.expect("start the lab");
    let lab = &running.lab;
    let _kubelet = running.check(lab.start_kubelet("x-b").await);
    running.check(lab.run_pod("x-b", POD, SCRIPT).await);
    for (node, prefer, path) in [
        ("cloud-a", Prefer::InternalIP, "by IPv6 address, from the gateway node"),
        ("cloud-b", Prefer::InternalIP, "by IPv6 address, from a member"),
        ("cloud-b", Prefer::Hostname, "by name, from a member"),
    ] {
        running.all_from(node, prefer, path, 5).await;
    }
    let route = |port: u16| lab.node("cloud-a").ns.sh(&format!("ip -6 route get fd10:1::12 ipproto tcp dport {port}"));
    assert!(running.check(route(10250)).contains("dev lo"), "the kubelet's port is intercepted");
    assert!(running.check(route(22)).contains("dev eth0"), "other ports are not intercepted");
}

#[tokio::test(flavor = "multi_thread")]
async fn kubelets_are_reached_by_address_from_a_cloud_with_ipv6_only() {
    require_root!();
    let pools = PoolSpec::three_with_ipv6_only(&["cloud"]);
    let running = Running::of(Lab::builder().pools(pools)).await.expect("start the lab");
    let lab = &running.lab;
    let _kubelet = running.check(lab.start_kubelet("x-b").await);
    // Pods have both families, and the nodes only IPv6; a gateway node and a member.
    for from in ["cloud-a", "cloud-b"] {
        for address in ["10.1.0.12", "[fd10:1::12]"] {
            running.reads_metrics(from, address).await;
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn kubelets_are_reached_by_address_from_a_cloud_with_encryption() {
    require_root!();
    let running = Running::of(Lab::builder()).await.expect("start the lab");
    let lab = &running.lab;
    let _kubelet = running.check(lab.start_kubelet("x-b").await);
    running.check(lab.cluster().set_encryption("cloud", "pool"));
    let tunnel = || async { lab.node("cloud-b").ns.run("ip", &["link", "show", "raven-wg0"]) };
    running.check(eventually(SOON, "a member of the cloud has a tunnel", tunnel).await);
    for from in ["cloud-a", "cloud-b"] {
        running.reads_metrics(from, "10.1.0.12").await;
    }
    // L3 carries node addresses, and the overlay still the kubelet's port.
    running.check(lab.cluster().put_setting("raven-agent-config", "forward-node-ip", "true").await);
    for from in ["cloud-a", "cloud-b"] {
        let carried = || async {
            let route = lab.node(from).ns.run("ip", &["route", "get", "10.1.0.12"])?;
            anyhow::ensure!(route.contains("dev raven-wg0"), "{route}");
            Ok(())
        };
        running.check(eventually(SOON, &format!("the tunnel of {from} carries node addresses"), carried).await);
        running.reads_metrics(from, "10.1.0.12").await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn kubectl_reaches_edge_pod_by_name_and_address_with_and_without_l3() {
    require_root!();
    let running = Running::of(Lab::builder()).await.expect("start the lab");
    let lab = &running.lab;
    let _kubelet = running.check(lab.start_kubelet("x-b").await);
    running.check(lab.run_pod("x-b", POD, SCRIPT).await);

    let server = running.check(lab.api_server_on("cloud-b", Prefer::Hostname).await);
    running.all(&server, "by name, from a member", 100).await;
    // `kubectl top` through metrics-server, with the DNS server and kube-proxy that were started with the API server.
    running.top(&server, "by name", Prefer::Hostname).await;
    running.check(server.kill());

    running.all_from("cloud-a", Prefer::Hostname, "by name, from the gateway node", 5).await;

    let server = running.check(lab.api_server_on("cloud-a", Prefer::InternalIP).await);
    running.all(&server, "by address, from the gateway node", 10).await;
    // Interception is limited to the kubelet's ports and visible in a map.
    let taken = running
        .check(lab.node("cloud-a").ns.sh("bpftool map dump pinned /sys/fs/bpf/raven/v1/maps/KUBELETS | tr -d ' \\n'"));
    assert!(taken.contains("\"address\":[10,1,0,12],\"port\":10250"), "{taken}");
    let route = |port: u16| lab.node("cloud-a").ns.sh(&format!("ip route get 10.1.0.12 ipproto tcp dport {port}"));
    assert!(running.check(route(10250)).contains("dev lo"), "the kubelet's port is intercepted");
    assert!(running.check(route(22)).contains("dev eth0"), "other ports are not intercepted");
    running.check(server.kill());

    let server = running.check(lab.api_server_on("cloud-b", Prefer::InternalIP).await);
    running.all(&server, "by address, from a member", 10).await;
    running.top(&server, "by address", Prefer::InternalIP).await;
    running.check(server.kill());

    // Prometheus and metrics-server read metrics by address, here from a pod on a member. The kubelet presents its own
    // certificate and requires the API server's client certificate.
    let file = |name: &str| lab.cluster().file(name).display().to_string();
    let (ca, certificate, key) = (file("ca.crt"), file("kubelet-client.crt"), file("kubelet-client.key"));
    let scrape = |more: &str| {
        lab.pod("cloud-b")
            .ns
            .sh(&format!("curl -sS -m 10 --cacert {ca} {more} https://10.1.0.12:10250/metrics/resource"))
    };
    let metrics = running.check(scrape(&format!("--cert {certificate} --key {key}")));
    assert!(metrics.contains("node_cpu_usage_seconds_total"), "{metrics}");
    assert_eq!(running.check(scrape("")), "Unauthorized", "a request without client certificate must be denied");

    // L3 is disabled on all nodes.
    running.check(lab.cluster().put_setting("raven-cfg", "enable-l3-tunnel", "false").await);
    for node in ["cloud-a", "x-a"] {
        let removed = || async {
            let links = lab.node(node).ns.sh("ip -o link")?;
            anyhow::ensure!(!links.contains("raven-wg0"), "{links}");
            Ok(())
        };
        running.check(eventually(SOON, &format!("L3 is disabled on {node}"), removed).await);
    }
    for (node, prefer, path) in [
        ("cloud-b", Prefer::Hostname, "by name, L3 off"),
        ("cloud-a", Prefer::InternalIP, "by address, from the gateway node, L3 off"),
        ("cloud-b", Prefer::InternalIP, "by address, from a member, L3 off"),
    ] {
        running.all_from(node, prefer, path, 5).await;
    }
}

impl Running {
    /// A pod on node `from` reads the metrics of the kubelet at `address`.
    async fn reads_metrics(&self, from: &str, address: &str) {
        let file = |name: &str| self.lab.cluster().file(name).display().to_string();
        let (ca, certificate, key) = (file("ca.crt"), file("kubelet-client.crt"), file("kubelet-client.key"));
        let url = format!("https://{address}:10250/metrics/resource");
        let scrape = format!("curl -sSg -m 5 --cacert {ca} --cert {certificate} --key {key} {url}");
        let scraped = || async {
            let metrics = self.lab.pod(from).ns.sh(&scrape)?;
            anyhow::ensure!(metrics.contains("node_cpu_usage_seconds_total"), "{metrics}");
            Ok(())
        };
        self.check(eventually(SOON, &format!("{from} reads metrics of {address}"), scraped).await);
    }

    /// Runs all checks once the path works: agents, CoreDNS and kube-proxy may not have processed recent changes yet.
    async fn all(&self, server: &SecondApiServer, path: &str, megabytes: usize) {
        self.check(eventually(SOON, &format!("the path works, {path}"), || async { kubectl::logs(server) }).await);
        report(self, &kubectl::all(server, path, megabytes));
    }

    /// Runs all checks with an API server on `node`.
    async fn all_from(&self, node: &str, prefer: Prefer, path: &str, megabytes: usize) {
        let server = self.check(self.lab.api_server_on(node, prefer).await);
        self.all(&server, path, megabytes).await;
        self.check(server.kill());
    }

    /// metrics-server on a member of the cloud pool reads the kubelet at the edge, and `kubectl
    /// top` reports the values.
    async fn top(&self, server: &SecondApiServer, path: &str, prefer: Prefer) {
        let mut metrics = self.check(self.lab.start_metrics_server("cloud-b", prefer).await);
        let seen = self.check(self.lab.top_node(server, "x-b").await);
        println!("ok kubectl top node, metrics-server {path}: {seen}");
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
