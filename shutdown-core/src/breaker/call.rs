//! How a call ended, and what that says about the one who was called.

/// How a call ended. The numbers are HTTP's only by custom: any protocol with a status can use them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Call {
    /// It was answered with this status.
    Status(u16),
    /// No connection could be made.
    ConnectFailed,
    /// There was no answer in time, or no connection.
    TimedOut,
    /// The connection broke before the answer, or what came was none.
    Broken,
    /// Whoever asked left before there was an answer.
    Abandoned,
}

/// What a call says about the one who was called.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Class {
    /// It is well.
    Success,
    /// It is not.
    Failure,
    /// Nothing: as if it had not been called.
    Ignored,
}

impl Call {
    /// The usual meaning: a status from 500 on, a failed connection, a timeout and a broken answer are failures. A 4xx
    /// is a success: whoever says that the client is wrong is well, and a scanner's 404s must not open a breaker.
    pub fn class(self) -> Class {
        match self {
            Self::Status(status) if status >= 500 => Class::Failure,
            Self::Status(_) => Class::Success,
            Self::ConnectFailed | Self::TimedOut | Self::Broken => Class::Failure,
            Self::Abandoned => Class::Ignored,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_client_s_mistake_is_no_failure_of_the_upstream() {
        for status in [100, 200, 301, 400, 404, 429, 499] {
            assert_eq!(Call::Status(status).class(), Class::Success, "{status}");
        }
        for call in [Call::Status(500), Call::Status(503), Call::ConnectFailed, Call::TimedOut, Call::Broken]
        {
            assert_eq!(call.class(), Class::Failure, "{call:?}");
        }
        assert_eq!(Call::Abandoned.class(), Class::Ignored);
    }
}
