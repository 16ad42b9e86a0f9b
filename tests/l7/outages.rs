//! Tests of outages of links and agents: new requests work soon afterwards. The kubelet is an HTTP server
//! on its read-only port.

use std::{
    collections::BTreeSet,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use k8s_openapi::api::{discovery::v1::EndpointSlice, events::v1::Event};
use kube::{Api, api::ListParams};
use raven_api::{
    gateway::{Endpoint, EndpointType, Gateway, ProxyConfig},
    proxy::INTERNAL_SERVICE,
};
use raven_tests::{
    Lab, Namespace, Nat, PoolSpec, Protocol, eventually, kubernetes::objects::default_gateway, patience,
    process::Process, proof, require_root,
};

use crate::{Running, SOON};

/// Time limit of a short attempt. An attempt that starts too early times out, and the next one succeeds.
const ATTEMPT: Duration = Duration::from_secs(1);
/// Time until new requests work after a link's return: the required 2 s, plus the measurement: a pause of 100 ms
/// between two attempts, and a thread, a connection and an answer on a busy machine.
const LINK_BACK: Duration = Duration::from_millis(2_000 + 300);
/// The same after an event that an idle edge cannot see: its next keepalive (15 s) is answered with a reset, it reconnects
/// (within 1 s), and a request that waits for the old proxy connection moves to the new one (0.5 s).
const NEXT_KEEPALIVE: Duration = Duration::from_secs(17);
/// The same for a killed agent, whose kernel resets its connections; the agent needs this time to start.
const AGENT_BACK: Duration = Duration::from_secs(4);
/// Time until a failed gateway node is removed from the Service: the other one notices it with its third failed check (4 s);
/// the agent's report and the controller's reaction are delayed by up to 1 s each to collect events.
const OUT_OF_SERVICE: Duration = Duration::from_secs(7);

/// Fails if a measured time exceeds its limit, which is scaled by [`patience`].
fn within(limit: Duration, took: Duration) {
    assert!(took < limit.mul_f64(patience()), "it took {took:?}, the limit is {limit:?}");
}

impl Running {
    /// Starts an HTTP server on a node's port 10255 and waits until it is listening.
    pub(crate) async fn serve(&self, node: &str) -> Result<Process> {
        let node = self.lab.node(node);
        std::fs::create_dir_all(node.dir.join("www"))?;
        std::fs::write(node.dir.join("www/metrics"), format!("of {}\n", node.name))?;
        let mut command = node.ns.command("busybox");
        command.args(["httpd", "-f", "-p", "10255", "-h"]).arg(node.dir.join("www"));
        let mut process = Process::start(format!("httpd-{}", node.name), &self.lab.logs(), command)?;
        eventually(SOON, &format!("the server of {} is listening", node.name), || {
            let listens = process.ensure_running().and_then(|()| {
                ensure!(!node.ns.sh("ss -Hltn 'sport = :10255'")?.is_empty(), "port 10255 is not open yet");
                Ok(())
            });
            async { listens }
        })
        .await?;
        Ok(process)
    }

    /// Sends one request by name to the first gateway node of the cloud.
    pub(crate) fn request(&self, from: &str, node: &str, seconds: u32) -> Result<String> {
        self.request_at("10.0.0.11", from, node, seconds)
    }

    /// Sends one request by name to the given gateway node.
    fn request_at(&self, gateway: &str, from: &str, node: &str, seconds: u32) -> Result<String> {
        self.lab
            .node(from)
            .ns
            .sh(&format!("curl -sS -m {seconds} -H 'Host: {node}:10255' http://{gateway}:10264/metrics"))
    }

    /// Waits until a request by address is answered by a node. Addresses are intercepted by other rules than names.
    async fn answered_by_address(&self, from: &Namespace, address: &str, node: &str) -> Result<()> {
        eventually(SOON, &format!("a request of {} to {address} is answered by {node}", from.name), || async {
            let text = from.sh(&format!("curl -sS -m 10 http://{address}:10255/metrics"))?;
            ensure!(text == format!("of {node}\n"), "unexpected answer {text:?}");
            Ok(())
        })
        .await
    }

    pub(crate) async fn answered(&self, node: &str) -> Result<Duration> {
        let begin = Instant::now();
        let what = format!("a request for {node} is answered");
        eventually(SOON, &what, || async {
            let text = self.request("cloud-b", node, 5)?;
            ensure!(text == format!("of {node}\n"), "unexpected answer {text:?}");
            Ok(())
        })
        .await?;
        Ok(begin.elapsed())
    }

    /// Waits until a request by name is answered, with short attempts and without starting a program for each. The time
    /// thus does not include that of an attempt that hung.
    async fn answered_soonest(&self, node: &str) -> Result<()> {
        let host = format!("{node}:10255");
        eventually(SOON, &format!("a new request for {node} is answered"), || async {
            let answer = proof::http_of(
                &self.lab.node("cloud-b").ns,
                "10.0.0.11:10264",
                &host,
                "/metrics",
                ATTEMPT.mul_f64(patience()),
            );
            let answer = answer.await?;
            ensure!(
                answer.starts_with("HTTP/1.1 200 ") && answer.contains(&format!("of {node}\n")),
                "unexpected answer {answer:?}"
            );
            Ok(())
        })
        .await
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn requests_recover_after_link_and_agent_outages() {
    require_root!();
    let mut pools = PoolSpec::three();
    pools[1].nat = Nat::RandomPorts;
    let mut running = Running::of(Lab::builder().pools(pools)).await.expect("start the lab");
    for node in ["x-b", "y-b"] {
        running.check(running.serve(node).await);
        running.check(running.answered(node).await);
    }
    // Nodes of the own pool are reached directly, and by name and address from a gateway node and a
    // member of the cloud.
    running.check(running.serve("cloud-b").await);
    assert_eq!(running.check(running.request("cloud-a", "cloud-b", 5)), "of cloud-b\n");
    for from in ["cloud-a", "cloud-b"] {
        running.check(running.answered_by_address(&running.lab.node(from).ns, "10.1.0.12", "x-b").await);
    }
    // From a pod of the gateway node.
    running.check(running.answered_by_address(&running.lab.pod("cloud-a").ns, "10.2.0.12", "y-b").await);

    // The link is cut for 30 s; the other pool is not affected.
    let router = running.lab.pool("edge-x").router.clone();
    running.check(router.sh("ip link set wan down"));
    let end = tokio::time::Instant::now() + Duration::from_secs(30);
    running.check(running.answered("y-b").await);
    let refused = running.request("cloud-b", "x-b", 20).expect("an error response before the timeout");
    assert!(refused.contains("proxy connections to Gateway edge-x"), "{refused}");
    tokio::time::sleep_until(end).await;
    let back = Instant::now();
    running.check(router.sh("ip link set wan up; ip route replace default via 198.51.100.1 dev wan"));
    running.check(running.answered_soonest("x-b").await);
    let after = back.elapsed();
    println!("new requests work {} ms after the link's return", after.as_millis());
    within(LINK_BACK, after);

    // The site's NAT loses its mappings and uses other ports: the answer to the edge's next keepalive is a reset.
    running.check(router.sh("conntrack -F 2>/dev/null"));
    let rebound = running.check(running.answered("x-b").await);
    println!("new requests work {} ms after the NAT lost its mappings", rebound.as_millis());
    within(NEXT_KEEPALIVE, rebound);

    // Agents are killed on both sides.
    for node in ["x-a", "cloud-a"] {
        running.agent(node).kill().expect("kill the agent");
        if node == "cloud-a" {
            // Without the agent, the request must not reach the gateway node's own server on that port.
            running.check(running.serve("cloud-a").await);
            let unanswered = running.lab.node("cloud-a").ns.sh("curl -sS -m 3 http://10.1.0.12:10255/metrics");
            assert!(unanswered.is_err(), "{unanswered:?}");
        }
        running.agent(node).restart().expect("restart the agent");
        let again = running.check(running.answered("x-b").await);
        println!("new requests work {} ms after the restart of the agent of {node}", again.as_millis());
        within(AGENT_BACK, again);
    }
    running.check(running.answered_by_address(&running.lab.node("cloud-b").ns, "10.1.0.12", "x-b").await);

    // Each stream has the same ID in the logs of both gateway nodes.
    let ids = |node: &str| -> BTreeSet<String> {
        let log = std::fs::read_to_string(running.lab.logs().join(format!("agent-{node}.log"))).unwrap_or_default();
        let plain = log.replace("\u{1b}[3m", "").replace("\u{1b}[0m", "").replace("\u{1b}[2m", "");
        plain.split("stream=").skip(1).filter_map(|rest| rest.split_whitespace().next()).map(str::to_owned).collect()
    };
    let (cloud, edge) = (ids("cloud-a"), ids("x-a"));
    // Streams that were open when an agent was killed may be missing.
    assert!(edge.intersection(&cloud).count() > 3, "at the edge {edge:?}, in the cloud {cloud:?}");

    // The gateway node gets another address, and its Node object still has the old one.
    running.check(running.serve("x-a").await);
    running.check(running.answered("x-a").await);
    let moved =
        "ip addr del 10.1.0.11/24 dev eth0; ip addr add 10.1.0.77/24 dev eth0; ip route replace default via 10.1.0.1";
    running.check(running.lab.node("x-a").ns.sh(moved));
    running.check(running.answered("x-a").await);

    // L7 is disabled: no listener, no rule and no stream is left.
    let client = &mut running.lab.node("cloud-b").ns.command("busybox");
    let mut open = KillOnDrop(
        client.args(["nc", "10.1.0.12", "10255"]).stdin(std::process::Stdio::piped()).spawn().expect("start nc"),
    );
    // A connection without data has no stream.
    std::io::Write::write_all(open.0.stdin.as_mut().expect("standard input is a pipe"), b"GET /").expect("write to nc");
    let streams = async || {
        proof::metric(&running.lab.node("x-a").ns, "raven_proxy_open_streams").await?.context("there is no such metric")
    };
    let opened = || async {
        ensure!(streams().await? != 0);
        Ok(())
    };
    running.check(eventually(SOON, "a stream is open", opened).await);
    running.check(running.lab.cluster().put_setting("raven-cfg", "enable-l7-proxy", "false").await);
    let disabled = || async {
        let left = running
            .lab
            .node("cloud-a")
            .ns
            .sh("ss -Hltn | grep -E ':(1026[234]|20000) ' || true; ip rule | grep -e 9029 -e 9030 || true")?;
        ensure!(left.is_empty(), "{left}");
        let left = running.lab.node("cloud-b").ns.sh("ip rule | grep -e 9029 -e 9030 || true")?;
        ensure!(left.is_empty(), "{left}");
        let open = streams().await?;
        ensure!(open == 0, "{open} streams are open");
        Ok(())
    };
    running.check(eventually(SOON, "L7 is disabled", disabled).await);
}

/// A child process that is killed on drop.
struct KillOnDrop(std::process::Child);

impl Drop for KillOnDrop {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn ambiguous_address_is_rejected_and_names_work() {
    require_root!();
    // Two sites installed from one image have the same LAN with the same addresses.
    let mut pools = PoolSpec::three();
    pools[2].lan = Some(1);
    let running = Running::of(Lab::builder().pools(pools)).await.expect("start the lab");
    for node in ["x-b", "y-b"] {
        running.check(running.serve(node).await);
        running.check(running.answered(node).await);
    }
    let ns = &running.lab.node("cloud-a").ns;
    let refused = || async {
        let answer = ns.sh("curl -sS -m 10 http://10.1.0.12:10255/metrics")?;
        assert!(!answer.starts_with("of "), "the request reached an arbitrary node: {answer}");
        ensure!(
            answer == "raven: the address 10.1.0.12 belongs to several nodes (x-b, y-b): reach them by name\n",
            "unexpected answer {answer:?}"
        );
        Ok(())
    };
    running.check(eventually(SOON, "a request to the address is rejected", refused).await);
    let counted = running.check(proof::metric(ns, "raven_proxy_refused_total{reason=\"Ambiguous\"}").await);
    assert!(counted.is_some_and(|n| n > 0), "{counted:?}");
    let events: Api<Event> = Api::all(running.lab.cluster().client());
    let reported = || async {
        let events = events.list(&ListParams::default()).await?.items;
        let of = |gateway: &str| {
            events.iter().find(|e| {
                e.reason.as_deref() == Some("NodeAddressAmbiguous")
                    && e.regarding.as_ref().and_then(|r| r.name.as_deref()) == Some(gateway)
            })
        };
        let note = of("edge-y").and_then(|e| e.note.clone()).context("there is no Event about edge-y")?;
        ensure!(note.contains("y-b (10.1.0.12 is also the address of node x-b of Gateway edge-x)"), "{note}");
        Ok(())
    };
    running.check(eventually(SOON, "an Event reports the ambiguous address", reported).await);
}

/// Returns the cloud's Gateway with a proxy on each of its first two nodes, both reachable by the router's address.
fn two_proxies(lab: &Lab) -> Gateway {
    let mut gateway = default_gateway(lab.site(), lab.cloud());
    let proxy = |node: &str, public_port: Option<i32>| Endpoint {
        node_name: node.to_owned(),
        type_: EndpointType::Proxy,
        public_ip: Some(lab.cloud().public_v4.to_string()),
        public_port,
        ..Endpoint::default()
    };
    gateway.spec.endpoints.extend([proxy("cloud-a", None), proxy("cloud-b", Some(SECOND_PORT.into()))]);
    gateway.spec.proxy_config = Some(ProxyConfig { replicas: 2, ..ProxyConfig::default() });
    gateway
}

/// Public port that the router maps to the second proxy.
const SECOND_PORT: u16 = 10272;

/// Result of a request by address.
struct RequestResult {
    began: Instant,
    took: Duration,
    failure: Option<String>,
}

/// Sends five requests per second to x-b's address until it is stopped. Requests are concurrent, because a request in
/// flight during the fault would block later ones.
struct RequestLoad {
    stop: std::sync::mpsc::Sender<()>,
    thread: std::thread::JoinHandle<Vec<std::thread::JoinHandle<RequestResult>>>,
}

impl RequestLoad {
    fn start(lab: &Lab, from: &str, address: &str) -> Self {
        let (stop, stopped) = std::sync::mpsc::channel();
        let ns = lab.node(from).ns.clone();
        let command = format!("curl -sS -m 30 http://{address}:10255/metrics");
        let send = move || {
            let began = Instant::now();
            let failure = match ns.sh(&command) {
                Ok(text) if text == "of x-b\n" => None,
                Ok(text) => Some(format!("unexpected answer {text:?}")),
                Err(e) => Some(format!("{e:#}")),
            };
            RequestResult { began, took: began.elapsed(), failure }
        };
        let thread = std::thread::spawn(move || {
            let mut requests = Vec::new();
            while stopped.recv_timeout(Duration::from_millis(200)) == Err(std::sync::mpsc::RecvTimeoutError::Timeout) {
                requests.push(std::thread::spawn(send.clone()));
            }
            requests
        });
        Self { stop, thread }
    }

    /// Stops and returns the number of requests sent after the fault and the longest duration. Fails if one of them
    /// failed. Requests sent before the fault are ignored, because they may have been in flight.
    fn stop(self, fault: Instant) -> Result<(usize, Duration)> {
        let _ = self.stop.send(());
        let threads = self.thread.join().map_err(|_| anyhow::anyhow!("the thread panicked"))?;
        let results =
            threads.into_iter().map(|thread| thread.join().map_err(|_| anyhow::anyhow!("a request's thread panicked")));
        let results: Vec<RequestResult> = results.collect::<Result<_>>()?;
        let after: Vec<&RequestResult> = results.iter().filter(|a| a.began >= fault).collect();
        let failures: Vec<&str> = after.iter().filter_map(|a| a.failure.as_deref()).collect();
        ensure!(failures.is_empty(), "{} of {} requests failed: {}", failures.len(), after.len(), failures.join("; "));
        let longest = after
            .iter()
            .map(|a| a.took)
            .max()
            .context("no request was sent after the fault, so the test proves nothing")?;
        Ok((after.len(), longest))
    }
}

/// Waits until the Service has exactly these addresses and returns the time it took.
async fn service_has(lab: &Lab, wanted: &[&str]) -> Result<Duration> {
    let begin = Instant::now();
    let slices: Api<EndpointSlice> = Api::namespaced(lab.cluster().client(), raven_api::DEFAULT_NAMESPACE);
    let of_service = ListParams::default().labels(&format!("kubernetes.io/service-name={INTERNAL_SERVICE}"));
    eventually(SOON, &format!("the Service has the addresses {}", wanted.join(" and ")), || async {
        let list = slices.list(&of_service).await?;
        let mut addresses: Vec<String> =
            list.items.into_iter().flat_map(|s| s.endpoints).flat_map(|e| e.addresses).collect();
        addresses.sort();
        ensure!(addresses == wanted, "the addresses are {addresses:?}");
        Ok(())
    })
    .await?;
    Ok(begin.elapsed())
}

#[tokio::test(flavor = "multi_thread")]
async fn new_requests_survive_failure_of_one_of_two_gateway_nodes() {
    require_root!();
    let mut pools = PoolSpec::three();
    pools[0].nodes.push("cloud-c".to_owned());
    let mut second = pools[0].forward(Protocol::Tcp, 10262, 1);
    second.public_port = SECOND_PORT;
    pools[0].forwards.push(second);
    let mut running = Running::of(Lab::builder().pools(pools)).await.expect("start the lab");
    running.check(running.lab.cluster().apply_gateway(&two_proxies(&running.lab)).await);
    running.check(running.serve("x-b").await);
    let both = ["10.0.0.11", "10.0.0.12"];
    running.check(service_has(&running.lab, &both).await);

    // The first fails as a node, the second by its agent alone. Whichever of the two handles the
    // client's requests fails once.
    for (victim, left) in [("cloud-a", both[1]), ("cloud-b", both[0])] {
        // A ready gateway node may not have a proxy connection to this pool yet.
        for gateway in both {
            let answers = || async {
                let text = running.request_at(gateway, "cloud-c", "x-b", 5)?;
                ensure!(text == "of x-b\n", "unexpected answer {text:?}");
                Ok(())
            };
            running.check(eventually(SOON, &format!("x-b is reached through {gateway}"), answers).await);
        }
        running.check(running.answered_by_address(&running.lab.node("cloud-c").ns, "10.1.0.12", "x-b").await);
        let load = RequestLoad::start(&running.lab, "cloud-c", "10.1.0.12");
        if victim == "cloud-a" {
            // The router's end of the link is set down, because the node itself must keep its routes.
            running.check(running.lab.cloud().router.sh("ip link set cloud-a down"));
        } else {
            running.agent(victim).kill().expect("kill the agent");
        }
        let fault = Instant::now();
        let noticed = running.check(service_has(&running.lab, &[left]).await);
        // New requests use the other gateway node; stop() waits for those sent before.
        let (requests, longest) = running.check(load.stop(fault));
        println!(
            "{victim} fails: removed from the Service after {} ms; {requests} requests by address since then, none failed, the longest took {} ms",
            noticed.as_millis(),
            longest.as_millis()
        );
        within(OUT_OF_SERVICE, noticed);
        assert_eq!(running.check(running.request_at(left, "cloud-c", "x-b", 5)), "of x-b\n");
        if victim == "cloud-a" {
            running.check(running.lab.cloud().router.sh("ip link set cloud-a up"));
        }
        running.agent(victim).restart().expect("restart the agent");
        running.check(service_has(&running.lab, &both).await);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn narrow_link_carries_large_and_small_requests_concurrently() {
    require_root!();
    const BYTES: usize = 1_000_000;
    // Of all connections of the site.
    const REPLACED: u64 = 3;
    let running = Running::of(Lab::builder()).await.expect("start the lab");
    running.check(running.serve("x-b").await);
    std::fs::write(running.lab.node("x-b").dir.join("www/large"), vec![b'x'; BYTES]).expect("write the file");
    running.check(running.answered("x-b").await);
    // Numbers of the site's connections at the cloud, which count up.
    let connections = || async {
        let text = running.lab.node("cloud-a").ns.sh("curl -sS http://[::1]:10265/connections")?;
        let listed: Vec<serde_json::Value> = text.lines().map(serde_json::from_str).collect::<Result<_, _>>()?;
        let site = listed.iter().filter(|connection| connection["gateway"] == "edge-x" && connection["state"] == "up");
        let numbers: Vec<u64> = site.filter_map(|connection| connection["connection"].as_u64()).collect();
        // Those of edge-y count, too.
        ensure!(numbers.len() == 2 && listed.len() == 4, "{text}");
        let all = listed.iter().filter_map(|connection| connection["connection"].as_u64());
        Ok((numbers, all.max().unwrap_or_default()))
    };
    let (before, last) = running.check(eventually(SOON, "both proxy connections exist", connections).await);
    // The link from the site has 256 kbit/s, and the router queues up to two seconds of data.
    let router = running.lab.pool("edge-x").router.clone();
    running.check(router.sh("tc qdisc add dev wan root tbf rate 256kbit burst 16kb latency 2s"));
    let ns = running.lab.node("cloud-b").ns.clone();
    let large =
        std::thread::spawn(move || ns.sh("curl -sS -m 120 -H 'Host: x-b:10255' http://10.0.0.11:10264/large | wc -c"));
    let mut slowest = Duration::ZERO;
    while !large.is_finished() {
        let begin = Instant::now();
        assert_eq!(running.check(running.request("cloud-b", "x-b", 20)), "of x-b\n");
        slowest = slowest.max(begin.elapsed());
    }
    let arrived = running.check(large.join().expect("join the thread"));
    assert_eq!(arrived.trim(), BYTES.to_string());
    println!(
        "{BYTES} bytes by a link of 256 kbit/s; the slowest concurrent small request took {} ms",
        slowest.as_millis()
    );
    // While TCP recovers from losses, nothing may cross a connection for seconds. It is replaced then, but not again and
    // again: a handshake is expensive on such a link.
    let (after, newest) = running.check(eventually(SOON, "both proxy connections exist", connections).await);
    println!("proxy connections {before:?} became {after:?}");
    assert!(newest <= last + REPLACED, "{} connections were dialled meanwhile", newest - last);
}
