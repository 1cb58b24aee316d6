"""What several test files share. None of these modules holds tests."""
