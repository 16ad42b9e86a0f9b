//! Tests of the lab itself: the guarantees that other tests rely on.

#![forbid(unsafe_code)]

use std::io::{BufRead, BufReader};
use std::net::{IpAddr, SocketAddr};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Result, ensure};
use k8s_openapi::api::core::v1::Node;
use kube::Api;
use kube::api::{Patch, PatchParams};
use raven_api::GatewayNode;
use raven_tests::capture::Capture;
use raven_tests::probe::{self, Echo, Flow};
use raven_tests::{Lab, Masquerade, MasqueradeBy, eventually, require_root};

const SOON: Duration = Duration::from_secs(5);

async fn network() -> Lab {
    Lab::builder().without_kubernetes().up().await.expect("build the lab")
}

async fn reached(lab: &Lab, from: &str, to: &str) -> Vec<bool> {
    let mut reached = Vec::new();
    for address in lab.pod(to).addresses() {
        let answer = probe::ping(&lab.pod(from).ns, address).await.expect("run ping");
        reached.push(answer.is_some());
    }
    reached
}

#[tokio::test(flavor = "multi_thread")]
async fn pods_reach_only_their_own_pool() {
    require_root!();
    let lab = network().await;
    for (from, to) in [("cloud-a", "cloud-b"), ("x-a", "x-b"), ("y-b", "y-a")] {
        assert_eq!(reached(&lab, from, to).await, [true, true], "{from} to {to}");
    }
    for (from, to) in [("cloud-a", "x-a"), ("x-a", "cloud-a"), ("x-b", "y-b")] {
        assert_eq!(reached(&lab, from, to).await, [false, false], "{from} to {to}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn source_addresses_are_unchanged_within_a_pool() {
    require_root!();
    let lab = network().await;
    let (from, to) = (lab.pod("x-a"), lab.pod("x-b"));
    for (source, target) in from.addresses().into_iter().zip(to.addresses()) {
        let echo = Echo::start(&to.ns, target).expect("start the echo server");
        let tcp = probe::tcp_echo(&from.ns, echo.address, &[7; 100_000], SOON).await.expect("TCP echo");
        assert_eq!(tcp.ip(), source);
        let udp = probe::udp_echo(&from.ns, echo.address, b"seven", SOON).await.expect("UDP echo");
        assert_eq!(udp.ip(), source);
        let bulk = probe::bulk(&from.ns, &to.ns, target, 20_000_000, SOON * 4).await.expect("bulk transfer");
        assert_eq!((bulk.bytes, bulk.source.ip()), (20_000_000, source));
        let flow = Flow::start(&from.ns, &to.ns, target, 1000).expect("start the flow");
        tokio::time::sleep(Duration::from_millis(500)).await;
        let report = flow.stop().await.expect("stop the flow");
        assert!(report.sent > 100, "{report:?}");
        assert_eq!((report.lost, report.duplicated), (0, 0), "{report:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn flow_counts_lost_packets() {
    require_root!();
    let lab = network().await;
    let (from, to) = (lab.pod("x-a"), lab.pod("x-b"));
    let flow = Flow::start(&from.ns, &to.ns, to.v4.into(), 1000).expect("start the flow");
    for (table, verdict) in [("some_arrive", "accept"), ("some_are_lost", "drop")] {
        let rule = format!(
            "table ip {table} {{ chain in {{ type filter hook input priority 0; meta l4proto udp counter {verdict}; }}; }}\n"
        );
        to.ns.nft(&rule).expect("load the rules");
        let counted = eventually(SOON, table, async || {
            let listed = to.ns.run("nft", &["list", "table", "ip", table])?;
            ensure!(!listed.contains("packets 0 "), "{listed}");
            Ok(())
        });
        counted.await.expect("packets of the flow match the rule");
    }
    let report = flow.stop().await.expect("stop the flow");
    assert!(report.lost > 0 && report.received > 0, "{report:?}");
    assert_eq!(report.lost + report.received, report.sent);
}

#[tokio::test(flavor = "multi_thread")]
async fn edge_is_behind_nat_and_cloud_forwards_its_port() {
    require_root!();
    let lab = network().await;
    let gateway = lab.node("cloud-a");
    let x = lab.pool("edge-x");
    let public: [IpAddr; 2] = [lab.cloud().public_v4.into(), lab.cloud().public_v6.into()];
    let seen: [IpAddr; 2] = [x.public_v4.into(), x.public_v6.into()];
    for ((listen, public), seen) in [gateway.lan_v4.into(), gateway.lan_v6.into()].into_iter().zip(public).zip(seen) {
        let _echo = Echo::on(&gateway.ns, SocketAddr::new(listen, 4500)).expect("start the echo server");
        let target = SocketAddr::new(public, 4500);
        let source = probe::udp_echo(&lab.node("x-a").ns, target, b"hello", SOON).await.expect("UDP through NAT");
        assert_eq!(source.ip(), seen, "the cloud sees the edge router");
    }
    // The router accepts no connections from outside, neither for itself nor for hosts behind it.
    let _echo = Echo::on(&lab.node("x-a").ns, SocketAddr::new(lab.node("x-a").lan_v4.into(), 4500))
        .expect("start the echo server");
    let inwards = SocketAddr::new(x.public_v4.into(), 4500);
    let short = Duration::from_millis(500);
    assert!(probe::udp_echo(&gateway.ns, inwards, b"hello", short).await.is_err());
}

#[tokio::test(flavor = "multi_thread")]
async fn cni_masquerades_traffic_leaving_the_pool() {
    require_root!();
    for by in MasqueradeBy::all() {
        for (masquerade, expected) in [(Masquerade::BeyondPool, true), (Masquerade::Never, false)] {
            let lab = Lab::builder().without_kubernetes().masquerade(masquerade, by).up().await.expect("build the lab");
            let (node, pod) = (lab.node("cloud-a"), lab.pod("cloud-a"));
            // The router is outside the pool's pod prefixes, and gets routes back to the node's pods.
            let router = &lab.cloud().router;
            router
                .ip("route add 10.244.1.0/24 via 10.0.0.11\nroute add fd00:244:1::/64 via fd10::11\n")
                .expect("add the routes");
            let pairs: [(IpAddr, IpAddr, IpAddr); 2] = [
                ("10.0.0.1".parse().expect("an IPv4 address"), node.lan_v4.into(), pod.v4.into()),
                ("fd10::1".parse().expect("an IPv6 address"), node.lan_v6.into(), pod.v6.into()),
            ];
            for (target, of_node, of_pod) in pairs {
                let echo = Echo::start(router, target).expect("start the echo server");
                let seen = probe::udp_echo(&pod.ns, echo.address, b"who am I", SOON).await.expect("UDP echo");
                assert_eq!(seen.ip(), if expected { of_node } else { of_pod }, "{masquerade:?} by {by:?}");
            }
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn capture_detects_unencrypted_traffic() {
    require_root!();
    let lab = network().await;
    let gateway = lab.node("cloud-a");
    let _echo = Echo::on(&gateway.ns, SocketAddr::new(gateway.lan_v4.into(), 4500)).expect("start the echo server");
    let target = SocketAddr::new(lab.cloud().public_v4.into(), 4500);
    let capture = Capture::internet(&lab).await.expect("start tcpdump");
    probe::udp_echo(&lab.node("x-a").ns, target, b"raven-marker", SOON).await.expect("UDP echo");
    let recording = capture.stop().await.expect("stop tcpdump");
    assert_eq!(recording.count("udp port 4500").expect("count packets"), 2);
    assert!(recording.contains(b"raven-marker").expect("search the recording"));
    assert!(recording.ensure_nothing_in_clear(&lab, b"another marker").is_ok());
    assert!(recording.ensure_nothing_in_clear(&lab, b"raven-marker").is_err());
}

#[tokio::test(flavor = "multi_thread")]
async fn nodes_have_their_own_bpf_file_system_state_and_devices() {
    require_root!();
    let lab = network().await;
    let (a, b) = (lab.node("x-a"), lab.node("x-b"));
    a.ns.sh("mkdir /sys/fs/bpf/raven; touch /var/lib/raven/mine /run/raven/mine").expect("create files");
    let seen = b.ns.sh("ls /sys/fs/bpf /var/lib/raven /run/raven").expect("list files");
    assert!(!seen.contains("mine") && !seen.contains("raven\n\n"), "{seen}");
    assert!(a.dir.join("lib/mine").exists());
    assert_eq!(a.ns.sh("ls /sys/class/net").expect("list devices"), "cni0\neth0\nlo\npod0\n");
}

#[tokio::test(flavor = "multi_thread")]
async fn concurrent_labs_are_isolated_and_removed_completely() {
    require_root!();
    let (one, two) = (network().await, network().await);
    assert_ne!(one.id, two.id);
    assert_eq!(reached(&one, "x-a", "x-b").await, [true, true]);
    assert_eq!(reached(&two, "x-a", "x-b").await, [true, true]);
    let (id, dir) = (one.id.clone(), one.dir.clone());
    drop(one);
    assert_eq!(traces(&id, &dir), Vec::<String>::new());
    assert_eq!(reached(&two, "x-a", "x-b").await, [true, true], "the other lab keeps working");
}

/// The owner of a lab with Kubernetes is killed with SIGKILL.
#[tokio::test(flavor = "multi_thread")]
async fn lab_of_killed_owner_is_removed_completely() {
    require_root!();
    let mut owner = Command::new(env!("CARGO_BIN_EXE_raven-lab"))
        .args(["up", "--hold", "--no-crds"])
        .stdout(Stdio::piped())
        .spawn()
        .expect("start raven-lab");
    let mut first = String::new();
    // Kept open until the end, so that the owner is ended by the signal and not by a closed pipe.
    let mut output = BufReader::new(owner.stdout.take().expect("standard output is a pipe"));
    output.read_line(&mut first).expect("raven-lab prints the lab's ID");
    let id = first.split_whitespace().nth(1).expect("a line `lab ID …`").to_owned();
    let dir = Path::new("/run/raven-lab").join(&id);
    assert!(!traces(&id, &dir).is_empty());
    owner.kill().expect("kill raven-lab");
    owner.wait().expect("wait for raven-lab");
    let removed = eventually(Duration::from_secs(20), "the lab is removed", async || {
        let left = traces(&id, &dir);
        ensure!(left.is_empty(), "traces are left: {left:?}");
        Ok(())
    });
    removed.await.expect("the guardian removes the lab");
}

#[tokio::test(flavor = "multi_thread")]
async fn api_server_has_nodes_and_node_bound_agent_tokens() -> Result<()> {
    require_root!();
    let lab = Lab::builder().up().await?;
    let cluster = lab.cluster();
    let api: Api<Node> = Api::all(cluster.client());
    assert_eq!(api.list(&Default::default()).await?.items.len(), 6);
    let ready =
        cluster.kubectl(&["get", "nodes", "x-a", "-o", "jsonpath={.status.conditions[0].status} {.spec.podCIDRs}"])?;
    assert_eq!(ready, r#"True ["10.244.3.0/24","fd00:244:3::/64"]"#);
    cluster.set_ready("x-a", false).await?;
    assert!(cluster.kubectl(&["get", "nodes", "x-a"])?.contains("NotReady"));
    // The request comes from behind the edge's NAT, to the cloud's public address.
    let node = lab.node("x-a");
    let kubeconfig = cluster.agent_kubeconfig(&lab, node).await?;
    let kubectl = raven_tests::kubernetes::binaries::Binaries::find_or_build()?.kubectl;
    let who =
        node.ns.run(&kubectl.to_string_lossy(), &["--kubeconfig", &kubeconfig.to_string_lossy(), "auth", "whoami"])?;
    assert!(who.contains("system:serviceaccount:kube-system:raven-agent-account"), "{who}");
    assert!(who.contains("node-name") && who.contains("[x-a]"), "{who}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn agent_can_write_only_its_own_gateway_node() -> Result<()> {
    require_root!();
    let lab = Lab::builder().up().await?;
    let kubeconfig = lab.cluster().agent_kubeconfig(&lab, lab.node("x-a")).await?;
    // The test runs on the host, where only the API server's address differs from the node's kubeconfig.
    let text = std::fs::read_to_string(kubeconfig)?;
    let host = lab.host_link.control_plane.to_string();
    let here = lab.dir.join("x-a.kubeconfig");
    std::fs::write(&here, text.replace(&lab.cloud().public_v4.to_string(), &host))?;
    let api: Api<GatewayNode> = Api::all(raven_tests::kubernetes::client(&here).await?);
    for (name, allowed) in [("x-a", true), ("x-b", false)] {
        let object = serde_json::json!({
            "apiVersion": "raven.openyurt.io/v1beta1", "kind": "GatewayNode", "metadata": {"name": name}, "spec": {},
        });
        let written = api.patch(name, &PatchParams::apply("raven-agent"), &Patch::Apply(&object)).await;
        assert_eq!(written.is_ok(), allowed, "{name}: {written:?}");
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn evidence_of_failed_test_is_saved() -> Result<()> {
    require_root!();
    let lab = Lab::builder().up().await?;
    lab.cluster().apply_gateways(&lab).await?;
    let dir = std::env::temp_dir().join(format!("raven-evidence-{}", lab.id));
    lab.save_evidence(&dir)?;
    let read = |file: &str| std::fs::read_to_string(dir.join(file)).expect(file);
    assert!(read("x-a/ip.txt").contains("10.244.3.1"));
    assert!(read("x-a/nft.txt").contains("masquerade"));
    assert!(read("objects.yaml").contains("kind: Gateway"));
    assert!(dir.join("kube-apiserver.log").exists());
    std::fs::remove_dir_all(dir)?;
    Ok(())
}

/// Returns all traces of a lab on this machine: folder, mounts, namespaces, devices and processes.
fn traces(id: &str, dir: &Path) -> Vec<String> {
    let mut traces = Vec::new();
    traces.extend(dir.exists().then(|| dir.display().to_string()));
    for line in std::fs::read_to_string("/proc/self/mountinfo").expect("read mountinfo").lines() {
        traces.extend(line.contains(id).then(|| line.to_owned()));
    }
    for folder in ["/run/netns", "/sys/class/net"] {
        let entries = std::fs::read_dir(folder).into_iter().flatten().flatten();
        let names = entries.map(|entry| entry.file_name().to_string_lossy().into_owned());
        traces.extend(names.filter(|name| name.starts_with(id)));
    }
    for process in std::fs::read_dir("/proc").expect("list processes").flatten() {
        let command = std::fs::read(process.path().join("cmdline")).unwrap_or_default();
        let command = String::from_utf8_lossy(&command).replace('\0', " ");
        traces.extend(command.contains(id).then_some(command));
    }
    traces
}
