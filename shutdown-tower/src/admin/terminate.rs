//! `/terminate`: who may ask, what for, and the one answer that all get. What it promises stands in [`admin`](super).
//!
//! The rule it keeps: what could be read in two ways stops nothing.

use bytes::Bytes;
use http::header::{AUTHORIZATION, CONNECTION, WWW_AUTHENTICATE};
use http::{HeaderMap, HeaderValue, Response, StatusCode};
use http_body_util::Full;
use serde_json::{Value, json};
use shutdown_core::{Phase, Urgency};
use subtle::ConstantTimeEq;

use super::{Admin, At, Head, json_answer, text, with_type};

/// What `/terminate` says where anybody could ask.
const UNGUARDED: &str = "off loopback /terminate needs a token: give Admin::token one, or listen on loopback";

impl Admin {
    pub(super) async fn terminate(&self, at: At, head: &Head) -> Response<Full<Bytes>> {
        if self.token.is_none() && !at.is_loopback {
            return text(StatusCode::FORBIDDEN, UNGUARDED);
        }
        if !self.is_authorized(&head.headers) {
            let mut response = text(StatusCode::UNAUTHORIZED, "a bearer token is required");
            response.headers_mut().insert(WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
            return response;
        }
        let asked = match Terminate::parse(head.uri.query().unwrap_or_default()) {
            Ok(asked) => asked,
            Err(problem) => return text(StatusCode::BAD_REQUEST, problem),
        };
        if !head.is_whole {
            // It must not be taken for a whole one (RFC 9112 §8).
            return text(StatusCode::BAD_REQUEST, "the body has not arrived in full: send none");
        }
        if asked.if_idle
            && let Some(counts) = self.busy()
        {
            return json_answer(StatusCode::CONFLICT, &counts);
        }
        if asked.dry_run {
            let plan = json!({ "dry_run": true, "mode": asked.urgency, "plan": self.shutdown.plan() });
            return json_answer(StatusCode::OK, &plan);
        }
        // Joined before it is asked for, so the process cannot leave in between.
        let join = self.shutdown.join();
        if asked.if_idle {
            self.terminate_idle(asked.urgency);
        } else {
            self.shutdown.terminate(asked.urgency);
        }
        let report = join.report().await;
        // Written once: there may be many who wait, and a report can be long.
        let json = self.report.get_or_init(|| {
            let mut json = serde_json::to_vec_pretty(&*report).unwrap_or_default();
            json.push(b'\n');
            json.into()
        });
        let mut response = with_type(StatusCode::OK, "application/json", json.clone());
        response.headers_mut().insert(CONNECTION, HeaderValue::from_static("close"));
        // Whoever serves this holds it until the answer's last byte is out.
        response.extensions_mut().insert(join);
        response
    }

    /// The counts, if the service runs and something is in flight. Once it is being stopped there is nothing left to
    /// refuse.
    fn busy(&self) -> Option<Value> {
        if self.shutdown.is_shutting_down() {
            return None;
        }
        // A request that becomes a session is a session before it stops being a request, and the snapshot looks at the
        // requests first: it sees one of them.
        let snapshot = self.shutdown.snapshot();
        (snapshot.requests.active + snapshot.sessions.open > 0).then(|| {
            json!({
                "busy": true,
                "requests": snapshot.requests,
                "connections": snapshot.connections,
                "sessions": snapshot.sessions,
            })
        })
    }

    /// Stops a service that was idle a moment ago: gracefully until the drain is over, for what has started since.
    fn terminate_idle(&self, urgency: Urgency) {
        let shutdown = self.shutdown;
        if shutdown.is_shutting_down() {
            return;
        }
        shutdown.terminate(Urgency::Graceful);
        if urgency > Urgency::Graceful {
            // On its own: a caller that hangs up has been heard all the same.
            tokio::spawn(async move {
                shutdown.until(Phase::Closing).await;
                if shutdown.active_session_count() == 0 {
                    shutdown.terminate(urgency);
                }
            });
        }
    }

    fn is_authorized(&self, headers: &HeaderMap) -> bool {
        let Some(token) = &self.token else { return true };
        let mut given = headers.get_all(AUTHORIZATION).iter();
        let (Some(value), None) = (given.next(), given.next()) else { return false };
        match value.as_bytes().split_at_checked("Bearer ".len()) {
            Some((scheme, given)) if scheme.eq_ignore_ascii_case(b"Bearer ") => {
                !token.is_empty() && bool::from(given.trim_ascii_start().ct_eq(token.as_bytes()))
            }
            _ => false,
        }
    }
}

/// What `/terminate` was asked for.
struct Terminate {
    urgency: Urgency,
    if_idle: bool,
    dry_run: bool,
}

impl Terminate {
    /// Reads the parameters as they are written. What could be read in two ways is refused: a second `if_idle` that
    /// takes the first one back would stop a busy service.
    fn parse(query: &str) -> Result<Self, &'static str> {
        let (mut urgency, mut if_idle, mut dry_run) = (None, None, None);
        if query.contains('%') {
            return Err("the parameters are plain words: percent-encoding is not read");
        }
        for pair in query.split('&').filter(|pair| !pair.is_empty()) {
            let (name, value) = pair.split_once('=').unwrap_or((pair, ""));
            let is_second = match name {
                "mode" => {
                    let modes = [Urgency::Graceful, Urgency::Fast, Urgency::Immediate];
                    let mode = modes.into_iter().find(|mode| mode.as_str() == value);
                    urgency.replace(mode.ok_or("mode is graceful, fast or immediate")?).is_some()
                }
                "if_idle" => if_idle.replace(flag(value).ok_or("if_idle is true or false")?).is_some(),
                "dry_run" => dry_run.replace(flag(value).ok_or("dry_run is true or false")?).is_some(),
                _ => return Err("the parameters are mode, if_idle and dry_run"),
            };
            if is_second {
                return Err("a parameter is given twice");
            }
        }
        Ok(Self {
            urgency: urgency.unwrap_or_default(),
            if_idle: if_idle.unwrap_or_default(),
            dry_run: dry_run.unwrap_or_default(),
        })
    }
}

fn flag(value: &str) -> Option<bool> {
    value.parse().ok()
}

#[cfg(test)]
mod tests {
    use std::convert::Infallible;
    use std::net::SocketAddr;
    use std::sync::Arc;
    use std::time::Duration;

    use http::Request;
    use http::header::{ALLOW, HOST};
    use http_body_util::{BodyExt, Empty, StreamBody};
    use shutdown_core::{Join, Reason, ShutdownConfig, ShutdownCoordinator, ShutdownReport, Stage};
    use tokio::task::{JoinHandle, yield_now};
    use tokio_test::{assert_pending, task};
    use tower::Service;

    use super::*;
    use crate::admin::AdminService;

    const HERE: &str = "127.0.0.1:8081";

    type Run = JoinHandle<Arc<ShutdownReport>>;

    fn coordinator() -> (ShutdownCoordinator, Run) {
        let (shutdown, driver) = ShutdownCoordinator::builder().build().expect("the default plan holds");
        (shutdown, tokio::spawn(driver.run()))
    }

    fn at(addr: &str, admin: Admin) -> AdminService {
        admin.at(addr.parse::<SocketAddr>().expect("an address"))
    }

    fn post(host: &str, query: &str) -> Request<Empty<Bytes>> {
        let builder = Request::post(format!("/terminate{query}")).header(HOST, host);
        builder.body(Empty::new()).expect("a request")
    }

    /// The status and the body. The process is not kept any longer.
    async fn ask<B>(service: &AdminService, request: Request<B>) -> (u16, String)
    where
        B: http_body::Body<Data: Send, Error: Into<Box<dyn std::error::Error + Send + Sync>>>
            + Send
            + 'static,
    {
        let response = service.clone().call(request).await.expect("infallible");
        let status = response.status().as_u16();
        let body = response.into_body().collect().await.expect("infallible").to_bytes();
        (status, String::from_utf8(body.to_vec()).expect("text"))
    }

    #[test]
    fn what_is_unknown_or_could_be_read_in_two_ways_is_refused() {
        assert!(Terminate::parse("").is_ok_and(|asked| asked.urgency == Urgency::Graceful));
        assert!(
            Terminate::parse("mode=fast&if_idle=true").is_ok_and(|asked| asked.if_idle && !asked.dry_run)
        );
        for bad in [
            "mode=gracefull",
            "mode=Fast",
            "mode",
            "if_idle",
            "if_idle=1",
            "if_idle=True",
            "dry_run=yes",
            "force=true",
            "=",
            "mode=fast&&x",
            "if_idle=true&if_idle=false",
            "if_idle=true&if_idle=true",
            "dry_run=true&dry_run=false",
            "mode=fast&mode=graceful",
            "if%5Fidle=true",
            "mode=%66ast",
            "mode=fast;if_idle=true",
        ] {
            assert!(Terminate::parse(bad).is_err(), "{bad}");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn off_loopback_terminate_is_refused_without_a_token_and_the_rest_answers() {
        let (shutdown, _run) = coordinator();
        for addr in ["10.0.0.7:8081", "0.0.0.0:8081", "[::]:8081", "[::ffff:10.0.0.7]:8081"] {
            let host = if addr.contains("10.0") { "10.0.0.7:8081" } else { addr };
            let open = at(addr, Admin::new(shutdown));
            for query in ["", "?dry_run=true", "?if_idle=true", "?mode=now"] {
                assert_eq!(
                    ask(&open, post(host, query)).await,
                    (403, format!("{UNGUARDED}\n")),
                    "{addr}{query}"
                );
            }
            let status = Request::get("/status").header(HOST, host).body(Empty::<Bytes>::new());
            assert_eq!(ask(&open, status.expect("a request")).await.0, 200);
            let guarded = at(addr, Admin::new(shutdown).token(Some("s3cret".to_owned())));
            assert_eq!(ask(&guarded, post(host, "?dry_run=true")).await.0, 401);
        }
        for addr in ["127.0.0.1:8081", "127.9.9.9:8081", "[::1]:8081"] {
            assert_eq!(
                ask(&at(addr, Admin::new(shutdown)), post(addr, "?dry_run=true")).await.0,
                200,
                "{addr}"
            );
        }
        // A wildcard is not loopback, whatever address a connection came to.
        let mut wildcard = at("0.0.0.0:8081", Admin::new(shutdown));
        wildcard.at.addr = HERE.parse().expect("an address");
        assert_eq!(ask(&wildcard, post(HERE, "")).await.0, 403);
        assert!(!shutdown.is_shutting_down());
    }

    #[tokio::test(start_paused = true)]
    async fn one_authorization_with_the_whole_token_is_accepted_and_nothing_else() {
        let (shutdown, _run) = coordinator();
        let guarded = at(HERE, Admin::new(shutdown).token(Some("s3cret".to_owned())));
        let with = |values: &[&str], query: &str| {
            let mut request = post(HERE, query);
            for value in values {
                request.headers_mut().append(AUTHORIZATION, value.parse().expect("a value"));
            }
            request
        };
        for good in ["Bearer s3cret", "bearer s3cret", "Bearer  s3cret"] {
            assert_eq!(ask(&guarded, with(&[good], "?dry_run=true")).await.0, 200, "{good}");
        }
        for bad in [
            &[][..],
            &[""],
            &["Bearer"],
            &["Bearer "],
            &["Bearer s3cre"],
            &["Bearer s3crets"],
            &["Bearer S3CRET"],
            &["Bearers3cret"],
            &["s3cret"],
            &["Basic s3cret"],
            &["Bearer s3cret", "Bearer s3cret"],
            &["Bearer s3cret", "Bearer wrong"],
            &["Bearer s3cret, Bearer s3cret"],
        ] {
            for query in ["", "?dry_run=true", "?if_idle=true", "?mode=now"] {
                assert_eq!(ask(&guarded, with(bad, query)).await.0, 401, "{bad:?}{query}");
            }
        }
        let nobodys = at(HERE, Admin::new(shutdown).token(Some(String::new())));
        for value in ["Bearer ", "Bearer", "Bearer x"] {
            assert_eq!(ask(&nobodys, with(&[value], "")).await.0, 401, "{value:?}");
        }
        yield_now().await;
        assert!(!shutdown.is_shutting_down());
    }

    #[tokio::test(start_paused = true)]
    async fn every_other_method_gets_405_and_is_told_of_post() {
        let (shutdown, _run) = coordinator();
        let service = at(HERE, Admin::new(shutdown));
        for method in ["GET", "HEAD", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "post", "TERMINATE"] {
            let mut request = post(HERE, "");
            *request.method_mut() = method.parse().expect("a method");
            let response = service.clone().call(request).await.expect("infallible");
            assert_eq!(
                (response.status().as_u16(), &response.headers()[ALLOW]),
                (405, &"POST".parse().expect("a value"))
            );
        }
        yield_now().await;
        assert!(!shutdown.is_shutting_down());
    }

    #[tokio::test(start_paused = true)]
    async fn a_body_is_read_and_means_nothing_unless_it_does_not_arrive() {
        let (shutdown, _run) = coordinator();
        let service = at(HERE, Admin::new(shutdown));
        let frame = || Ok::<_, Infallible>(http_body::Frame::data(Bytes::from_static(&[b'x'; 8192])));
        let whole = StreamBody::new(frames(vec![frame(), frame()], false));
        assert_eq!(ask(&service, post(HERE, "?dry_run=true").map(|_| whole)).await.0, 200);
        let endless = StreamBody::new(frames(vec![frame()], true));
        assert_eq!(ask(&service, post(HERE, "").map(|_| endless)).await.0, 400);
        let broken = StreamBody::new(frames(vec![Err(std::io::Error::other("gone"))], false));
        assert_eq!(ask(&service, post(HERE, "").map(|_| broken)).await.0, 400);
        yield_now().await;
        assert!(!shutdown.is_shutting_down());
    }

    #[tokio::test(start_paused = true)]
    async fn if_idle_refuses_a_busy_service_with_its_counts() {
        let (shutdown, run) = coordinator();
        let service = at(HERE, Admin::new(shutdown));
        let request = shutdown.request_start().expect("running");
        let session = shutdown.session_start("chat").expect("running");
        let busy = async |requests: u64, sessions: u64| {
            for query in ["?if_idle=true", "?if_idle=true&mode=immediate", "?if_idle=true&dry_run=true"] {
                let (status, counts) = ask(&service, post(HERE, query)).await;
                let counts: Value = serde_json::from_str(&counts).expect("JSON");
                assert_eq!((status, &counts["busy"]), (409, &true.into()));
                assert_eq!(counts["requests"]["active"], requests);
                assert_eq!(counts["sessions"]["open"], sessions);
            }
        };
        busy(1, 1).await;
        drop(request);
        busy(0, 1).await;
        drop(session);
        yield_now().await;
        assert!(!shutdown.is_shutting_down());
        assert_eq!(ask(&service, post(HERE, "?if_idle=true&dry_run=true")).await.0, 200);
        assert_eq!(ask(&service, post(HERE, "?if_idle=true")).await.0, 200);
        assert_eq!(run.await.expect("no panic").exit_code, 0);
    }

    #[tokio::test(start_paused = true)]
    async fn what_starts_between_the_look_and_the_stop_is_served_in_every_mode() {
        for mode in [Urgency::Graceful, Urgency::Fast, Urgency::Immediate] {
            let builder = ShutdownCoordinator::builder().stage_task(Stage::Database, "pool", |_| async {
                tokio::time::sleep(Duration::from_secs(1)).await;
                Ok(())
            });
            let (shutdown, driver) = builder.build().expect("the plan holds");
            let run = tokio::spawn(driver.run());
            let mut service = at(HERE, Admin::new(shutdown));
            let mut call = task::spawn(service.call(post(HERE, &format!("?if_idle=true&mode={mode}"))));
            assert_pending!(call.poll());
            // It has looked and has asked; the driver has yet to hear of it.
            let request = shutdown.request_start().expect("still running");
            tokio::time::sleep(Duration::from_secs(20)).await;
            assert_eq!((shutdown.phase(), shutdown.active_request_count()), (Phase::Draining, 1), "{mode}");
            drop(request);
            drop(call.await.expect("infallible"));
            let report = run.await.expect("no panic");
            assert_eq!((report.requests.cut, report.urgency), (0, mode));
            // The mode counts for the stages.
            assert_eq!(report.duration_ms >= 21_000.0, mode == Urgency::Graceful, "{report:?}");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn if_idle_joins_a_shutdown_and_hurries_nobody() {
        let (shutdown, run) = coordinator();
        let service = at(HERE, Admin::new(shutdown));
        let request = shutdown.request_start().expect("running");
        shutdown.initiate_shutdown(Reason::requested("a test"));
        shutdown.until(Phase::Draining).await;
        let call =
            tokio::spawn(async move { ask(&service, post(HERE, "?if_idle=true&mode=immediate")).await });
        tokio::time::sleep(Duration::from_secs(20)).await;
        assert_eq!((shutdown.phase(), call.is_finished()), (Phase::Draining, false));
        drop(request);
        let (status, body) = call.await.expect("no panic");
        let report = run.await.expect("no panic");
        assert_eq!((status, report.urgency), (200, Urgency::Graceful));
        assert_eq!(serde_json::from_str::<ShutdownReport>(&body).expect("a report").requests.cut, 0);
    }

    #[tokio::test(start_paused = true)]
    async fn callers_of_every_phase_get_one_report_and_the_most_urgent_counts() {
        let mut config = ShutdownConfig::default();
        config.lame_duck = Duration::from_secs(2);
        let builder = ShutdownCoordinator::builder().config(config);
        let (shutdown, driver) = builder
            .stage_task(Stage::Database, "pool", |_| async {
                tokio::time::sleep(Duration::from_secs(2)).await;
                Ok(())
            })
            .build()
            .expect("the plan holds");
        let run = tokio::spawn(driver.run());
        let service = at(HERE, Admin::new(shutdown));
        let request = shutdown.request_start().expect("running");
        let ask_now = |query| {
            let service = service.clone();
            tokio::spawn(async move { ask(&service, post(HERE, query)).await })
        };
        // Whoever hangs up has been heard.
        let mut gone = service.clone();
        let mut first = task::spawn(gone.call(post(HERE, "")));
        assert_pending!(first.poll());
        drop(first);
        let mut calls = Vec::new();
        for phase in [Phase::LameDuck, Phase::Draining] {
            shutdown.until(phase).await;
            calls.push(ask_now("?mode=graceful"));
        }
        tokio::time::sleep(Duration::from_secs(1)).await;
        drop(request);
        shutdown.until(Phase::Closing).await;
        calls.push(ask_now("?mode=immediate"));
        calls.push(ask_now("?mode=fast"));
        // One that comes while the answers are awaited.
        let join: Join = shutdown.join();
        join.report().await;
        calls.push(ask_now("?mode=immediate"));
        yield_now().await;
        drop(join);
        let report = run.await.expect("no panic");
        calls.push(ask_now(""));
        let mut answers = Vec::new();
        for call in calls {
            answers.push(call.await.expect("no panic"));
        }
        let (status, json) = &answers[0];
        assert_eq!(
            (*status, serde_json::from_str::<ShutdownReport>(json).expect("a report")),
            (200, (*report).clone())
        );
        assert!(answers.iter().all(|answer| answer == &answers[0]), "{answers:#?}");
        assert_eq!((report.urgency, report.requests.cut), (Urgency::Immediate, 0));
    }

    /// These frames, and perhaps nothing for ever.
    fn frames<E: Send + 'static>(
        frames: Vec<Result<http_body::Frame<Bytes>, E>>,
        hangs: bool,
    ) -> impl futures_core::Stream<Item = Result<http_body::Frame<Bytes>, E>> + Send {
        struct Frames<E>(std::vec::IntoIter<Result<http_body::Frame<Bytes>, E>>, bool);
        impl<E> Unpin for Frames<E> {}
        impl<E> futures_core::Stream for Frames<E> {
            type Item = Result<http_body::Frame<Bytes>, E>;
            fn poll_next(
                mut self: std::pin::Pin<&mut Self>,
                _: &mut std::task::Context<'_>,
            ) -> std::task::Poll<Option<Self::Item>> {
                match self.0.next() {
                    None if self.1 => std::task::Poll::Pending,
                    frame => std::task::Poll::Ready(frame),
                }
            }
        }
        Frames(frames.into_iter(), hangs)
    }
}
